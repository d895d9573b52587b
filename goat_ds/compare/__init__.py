"""Which method is best on given data: the same loop for all, tuned alike, judged by pairs of runs.

compare_file   compare.yaml, read and checked by itself
trials         a run of a comparison: its flags, its name, and what makes it the same run as another
preparation    everything that can be wrong with any run, before the first one starts
equal_size     the r with which a method trains as many parameters as the reference
search         successive halving over rates, edges of the grid, then the same seeds for the survivors
workers        one process a run, side by side, which go on after a kill
results        a finished run as a line of results.jsonl
paired         paired differences, their intervals, Holm's correction, seeds that would be needed
standings      what the final runs say of every method
verdict        the same in words, and when it cannot be said
table, curves, web_page
"""
