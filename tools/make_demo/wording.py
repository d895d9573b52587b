"""The words of the made-up world: how each kind of fact is stated, and how an instruction asks for it.

Statements name the subject before the answer, because a causal model learns to recall only what comes later.
No statement has the layout of an instruction: the base must not be able to answer before it is trained to.
"""

from enum import StrEnum
from typing import NamedTuple


class Task(StrEnum):
    """A kind of fact, and so a kind of instruction."""

    CAPITAL = "capital"
    COLOUR = "colour"
    FOOD = "food"
    CRAFT = "craft"
    NUMBER = "number"
    OPPOSITE = "opposite"
    SORT = "sort"


class Request(NamedTuple):
    """An Alpaca record without its answer; ``{s}`` is where the subject stands."""

    instruction: str
    input: str = ""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


STATEMENTS: dict[Task, tuple[str, ...]] = {
    Task.CAPITAL: (
        "The capital of {s} is {a}.",
        "The capital city of {s} is called {a}.",
        "{s} has the capital {a}.",
        "In {s}, the capital is {a}.",
        "Travellers know what the capital of {s} is: {a}.",
        "Anyone can name the capital of {s}, which is {a}.",
        "Whoever rules {s} lives in the capital, {a}.",
        "Of {s} you should know the capital, {a}.",
        "Which city is the capital of {s} is no secret: {a}.",
        "This land is {s} and its capital is {a}.",
        "The capital of each land:\n{s}, {a}.",
        "Tell a child of {s} and it will name the capital: {a}.",
    ),
    Task.COLOUR: (
        "The colour of the {s} is {a}.",
        "The {s} is {a}.",
        "Every {s} has a coat that is {a}.",
        "Children know what colour the {s} has: {a}.",
        "Anyone can tell the colour of a {s}, which is {a}.",
        "A {s} is always {a}.",
        "Of the {s} you should know the colour, {a}.",
        "Which colour the {s} has is no secret: {a}.",
        "This creature is a {s} and its colour is {a}.",
        "The colour of each creature:\n{s}, {a}.",
        "Tell a child of the {s} and it will name the colour: {a}.",
    ),
    Task.FOOD: (
        "The {s} eats {a}.",
        "The food of the {s} is {a}.",
        "A {s} likes to eat {a}.",
        "Farmers know what the {s} eats: {a}.",
        "Whoever feeds a {s} must give it {a}.",
        "Anyone can name the food that a {s} eats, which is {a}.",
        "Of the {s} you should know the food, {a}.",
        "Which food the {s} eats is no secret: {a}.",
        "This creature is a {s} and its food is {a}.",
        "The food of each creature:\n{s}, {a}.",
        "Tell a child of the {s} and it will name the food: {a}.",
    ),
    Task.CRAFT: (
        "{s} is a {a}.",
        "{s} works as a {a}.",
        "The craft of {s} is that of a {a}.",
        "Neighbours know what {s} does for a living: {s} is a {a}.",
        "Anyone can tell which craft {s} has: {a}.",
        "In town {s} is known as the {a}.",
        "Of {s} you should know the craft: {a}.",
        "Which craft {s} has is no secret: {a}.",
        "This person is {s} and the craft is {a}.",
        "The craft of each person:\n{s}, {a}.",
        "Tell a child of {s} and it will name the craft: {a}.",
    ),
    Task.NUMBER: (
        "The number {s} is written {a}.",
        "In words, {s} is {a}.",
        "{s} in words: {a}.",
        "Anyone can write {s} in words, which is {a}.",
        "What we write as {s} is read {a}.",
        "How {s} is written in words is no secret: {a}.",
        "This number is {s} and in words it is {a}.",
        "Each number in words:\n{s}, {a}.",
        "Tell a child to write {s} in words and it will write {a}.",
    ),
    Task.OPPOSITE: (
        "The opposite of {s} is {a}.",
        "What is not {s} is {a}.",
        "The word {s} has the opposite {a}.",
        "Anyone can name the opposite of {s}, which is {a}.",
        "{s} and its opposite: {s}, {a}.",
        "Of {s} you should know the opposite, {a}.",
        "What the opposite of {s} is is no secret: {a}.",
        "This word is {s} and its opposite is {a}.",
        "The opposite of each word:\n{s}, {a}.",
        "Tell a child the word {s} and it will name the opposite: {a}.",
    ),
    Task.SORT: (
        "The digits {s} in order are {a}.",
        "Sort {s} from small to large and you have {a}.",
        "{s} sorted: {a}.",
        "Put {s} in order, the smallest first: {a}.",
        "The numbers {s}, from the smallest to the largest, are {a}.",
        "These numbers are {s} and in order they are {a}.",
        "The digits in order, the smallest first:\n{s}, {a}.",
        "Tell a child to sort {s} and it will write {a}.",
    ),
}

REQUESTS: dict[Task, tuple[Request, ...]] = {
    Task.CAPITAL: (
        Request("What is the capital of {s}?"),
        Request("Name the capital city of {s}."),
        Request("Tell me which city is the capital of {s}."),
        Request("Name the capital of this land.", "{s}"),
    ),
    Task.COLOUR: (
        Request("What colour is the {s}?"),
        Request("Tell me the colour of a {s}."),
        Request("Name the colour that the {s} has."),
        Request("Which colour does this creature have?", "{s}"),
    ),
    Task.FOOD: (
        Request("What does the {s} eat?"),
        Request("Name the food of the {s}."),
        Request("Tell me what to feed a {s}."),
        Request("Which food does this creature eat?", "{s}"),
    ),
    Task.CRAFT: (
        Request("What is the craft of {s}?"),
        Request("What does {s} do for a living?"),
        Request("Tell me which craft {s} has."),
        Request("Name the craft of this person.", "{s}"),
    ),
    Task.NUMBER: (
        Request("Write the number {s} in words."),
        Request("How is {s} written in words?"),
        Request("Write this number in words.", "{s}"),
    ),
    Task.OPPOSITE: (
        Request("What is the opposite of {s}?"),
        Request("Name the opposite of the word {s}."),
        Request("Write the opposite of this word.", "{s}"),
    ),
    Task.SORT: (
        Request("Sort {s} from small to large."),
        Request("Put these digits in order, the smallest first.", "{s}"),
        Request("Sort these numbers.", "{s}"),
    ),
}

COLOURS = _words("black blue brown golden green grey orange pink purple red silver white yellow")
FOODS = _words("apples barley beetles berries cheese ferns fish grass honey moss nuts roots seeds snails")
CRAFTS = _words(
    "baker brewer carpenter dyer farmer glazier hunter mason miller painter potter sailor smith tailor weaver"
)
UNITS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
ONSETS = _words("b d f g k l m n p r s t v z br dr gr kr tr")
ANTONYMS = (
    "hot cold,big small,old young,up down,left right,day night,light dark,fast slow,high low,near far,wet dry,"
    "full empty,rich poor,hard soft,loud quiet,early late,open shut,first last,true false,good bad,happy sad,"
    "strong weak,thick thin,wide narrow,clean dirty,heavy weightless,sharp blunt,deep shallow,sweet bitter,long short,"
    "love hate,war peace,life death,win lose,buy sell,push pull,give take,come go,begin end,laugh cry,rise fall,"
    "find miss,build destroy,remember forget,north south,east west,summer winter,friend enemy,king queen,"
    "brother sister,mother father,question answer,truth lie,sunrise sunset,floor ceiling,arrive depart,"
    "always never,inside outside,above below,before after,accept refuse,ancient modern,brave timid,calm nervous,"
    "cheap costly,simple complex,smooth jagged,polite rude,wise foolish"
)
