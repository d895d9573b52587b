"""A comparison in words: what to take for these data, what they cannot tell, and what was and was not equal."""

from collections.abc import Iterator

from goat_ds.compare.compare_file import Budget
from goat_ds.compare.paired import POWER, pairs_needed
from goat_ds.compare.standings import Difference, Standing, Standings

FEW_SEEDS = 3


def sentences(found: Standings) -> Iterator[str]:
    """Yield the verdict: first what to take, then the others, then warnings, last what was equal."""
    if found.num_missing:
        yield f"{found.num_missing} runs are still to be done: this is what the others say."
    if not found.standings:
        yield "No run of the final has ended well, so there is nothing to compare."
    else:
        yield from _advice(found)
        yield from _warnings(found)
    yield from _equal(found)


def _advice(found: Standings) -> Iterator[str]:
    best, reference = found.standings[0], found.settings.reference
    lead, better = best, _better_than_reference(found)
    # What diverged comes last, whatever its mean over the seeds that are left.
    among = " of those that finished every seed" if found.standings[-1].num_bad and not best.num_bad else ""
    if found.of(reference) is None:
        yield f"{best.method} has the lowest mean, {_mean(best)}; {reference}, the reference, has none to compare."
    elif better is not None:
        lead = better
        yield _taken(found, found.to_reference[better.method])
    elif best.method == reference:
        yield f"{reference}, the reference, has the lowest mean held-out loss{among}: {_mean(best)}. Keep it."
    else:
        words = _untold(best.method, reference, found.to_reference.get(best.method))
        yield f"{best.method} has the lowest mean{among}, {_mean(best)}, but {words} Until they do, keep {reference}."
    for other in found.standings:
        if other is not lead and (other.method != reference or best.method == reference):
            yield _beside(lead, other, found.between(lead.method, other.method))


def _better_than_reference(found: Standings) -> Standing | None:
    """Return the method with the lowest mean of those that the data tell to be better than the reference.

    A noisier one may have a lower mean still, and not be told from either.
    """
    for standing in found.standings:
        difference = found.to_reference.get(standing.method)
        # A method that diverges on some seeds is judged on the others, and is none to recommend.
        if difference is not None and difference.is_seen and difference.paired.mean < 0 and not standing.num_bad:
            return standing
    return None


def _taken(found: Standings, difference: Difference) -> str:
    paired = difference.paired
    return (
        f"Take {difference.ours}: its held-out loss is lower than that of {difference.theirs} by {_size(difference)}, "
        f"in {paired.num_wins} of {paired.num_pairs} pairs; {_comparisons(found)}."
    )


def _comparisons(found: Standings) -> str:
    count = len(found.to_reference)
    return "one comparison was made" if count == 1 else f"corrected for {count} comparisons (Holm)"


def _beside(lead: Standing, other: Standing, difference: Difference | None) -> str:
    if difference is not None and difference.is_seen:
        better, worse = difference.ours, difference.theirs
        if difference.paired.mean > 0:
            # What diverged comes after what did not, whatever their pairs say.
            better, worse = worse, better
        return f"{worse} is worse than {better} by {_size(difference)}, in their pairs."
    words = _untold(lead.method, other.method, difference)
    return words[0].upper() + words[1:]


def _untold(one: str, other: str, difference: Difference | None) -> str:
    """Return that two methods cannot be told apart, why, and what it would take."""
    if difference is None:
        return f"{one} and {other} have no seed in common."
    paired = difference.paired
    if paired.deviation is None:
        return f"these data do not tell {one} from {other}: they differ by {_size(difference)} in one pair of runs."
    if paired.excludes_zero:
        why = f"the difference of {_size(difference)} does not stand when corrected for all comparisons (Holm)"
    else:
        why = f"the difference of {_size(difference)} has 0 in its interval"
    return f"these data do not tell {one} from {other}: {why}; {_needed(difference)}."


def _needed(difference: Difference) -> str:
    paired = difference.paired
    assert paired.deviation is not None
    pairs = pairs_needed(paired.mean, paired.deviation)
    if pairs is None:
        return "a difference of this size would need more seeds than anyone runs"
    more = max(pairs - paired.num_pairs, 1)
    return (
        f"about {more} more {'seed' if more == 1 else 'seeds'} would be needed to see a difference of this size "
        f"in {POWER:.0%} of all cases"
    )


def _size(difference: Difference) -> str:
    """Return how much lower the better of the two is."""
    paired = difference.paired
    sign = -1 if paired.mean < 0 else 1
    if paired.low is None or paired.high is None:
        return f"{sign * paired.mean:.4f}"
    low, high = sorted((sign * paired.low, sign * paired.high))
    return f"{sign * paired.mean:.4f} [95 % interval {low:.4f} to {high:.4f}]"


def _mean(standing: Standing) -> str:
    mean, deviation = standing.spread
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _warnings(found: Standings) -> Iterator[str]:
    for name in found.absent:
        yield f"Warning: {name} has no run of the final that ended well."
    for standing in found.standings:
        yield from _warnings_of(standing)
    few = min(len(standing.losses) for standing in found.standings)
    if few < FEW_SEEDS:
        seeds = "1 seed is" if few == 1 else f"{few} seeds are"
        yield f"Warning: {seeds} too few to trust an interval; give final.seeds at least {FEW_SEEDS}."
    if len(set(found.tuning.values())) > 1:
        tried = ", ".join(f"{name} {count}" for name, count in found.tuning.items())
        yield (
            f"Warning: the methods were not tuned alike: points tried are {tried}. More of them find a lower loss by "
            "chance."
        )
    devices = {str(row["device"]) for standing in found.standings for row in standing.rows.values()}
    if len(devices) > 1:
        yield f"Warning: runs of the final were made on different devices: {'; '.join(sorted(devices))}."
    versions = {str(sorted(row["versions"].items())) for standing in found.standings for row in standing.rows.values()}
    if len(versions) > 1:
        yield (
            "Warning: runs of the final were made with different versions of the libraries or of this code, as "
            "results.jsonl says; with a new output_dir all are made by one."
        )


def _warnings_of(standing: Standing) -> Iterator[str]:
    name, rate = standing.method, standing.point.rate
    if standing.at_edge:
        yield (
            f"Warning: the best rate of {name} ({rate:g}) is at the edge of those that were tried; a better one may "
            "lie beyond it. Give it more rates, or a larger max_extensions."
        )
    if standing.only_rate:
        yield f"Warning: {name} was trained with one learning rate ({rate:g}), so it is not tuned."
    if standing.num_bad:
        yield f"Warning: {standing.num_bad} final runs of {name} diverged or failed; they are left out of its mean."
    if standing.num_finalists > 1:
        yield (
            f"Warning: {name} is the best of {standing.num_finalists} finalists, chosen by the losses it is judged by, "
            "which flatters it; screen.keep 1 avoids that."
        )


def _equal(found: Standings) -> Iterator[str]:
    """Yield what was equal."""
    settings = found.settings
    equal = f"the base, the data, {settings.final.steps} steps of the same batches for every seed, hence the tokens"
    sizes = {standing.method: standing.num_trained for standing in found.standings}
    trained = ", ".join(f"{name} {count:,}" for name, count in sizes.items())
    match settings.budget:
        case Budget.RANK:
            without = [name for name in sizes if not settings.has_rank(name)]
            but = f" (as far as {', '.join(without)} has one)" if without else ""
            words = f"{equal}, and the total rank{but}. Trained parameters: {trained}."
        case Budget.PARAMETERS:
            apart = _largest_difference(sizes, settings.reference)
            chosen = ", ".join(f"{s.method} r {s.r}" for s in found.standings if s.r is not None)
            words = f"{equal}, and the trained parameters, within {apart:.1%}: {trained} (chosen: {chosen})."
        case Budget.NONE:
            words = f"{equal}. Neither rank nor trained parameters were: {trained}."
    yield f"Equal were: {words}"
    if settings.screen is not None and settings.final.eval_data is None:
        yield (
            "Rates were chosen on the held-out data that the final is judged by, alike for all; final.eval_data names "
            "other data."
        )


def _largest_difference(sizes: dict[str, int], reference: str) -> float:
    target = sizes.get(reference) or max(sizes.values(), default=1)
    return max((abs(count / target - 1) for count in sizes.values()), default=0.0)
