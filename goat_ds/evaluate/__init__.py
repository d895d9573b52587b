"""How good a model is: on the labels of data, on the answers it gives, and on tasks of lm-evaluation-harness.

    settings ─> subject     what the path or name is, and the model and tokenizer it stands for
                questions   records to prompts, expected answers and choices
                perplexity, exact_match, choice_accuracy, harness ─> report

Everything that can be wrong and can be known before a weight is read is reported at once. One process, one device.
"""

from goat_ds.evaluate.evaluation import evaluate
from goat_ds.evaluate.report import Report
from goat_ds.evaluate.settings import Dtype, EvalSettings, Metric

__all__ = ["Dtype", "EvalSettings", "Metric", "Report", "evaluate"]
