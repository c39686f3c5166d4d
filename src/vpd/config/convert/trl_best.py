"""TRL's settings of the best step and of the upload to the Hub."""

from typing import Any

from vpd.config.convert import Foreign, Outcome, ignored, impossible, mapped

METRICS = {"reward": "eval/reward", "rewards/mean": "eval/reward", "accuracy": "eval/accuracy"}


def _metric_of(f: Foreign) -> str | None:
    """The metric here that steps are compared by, None where TRL takes the loss or one that is not here."""
    return METRICS.get(str(f["metric_for_best_model"]).removeprefix("eval_"))


def metric(value: Any, f: Foreign) -> Outcome:
    if value in (None, "loss", "eval_loss"):
        return ignored("there is no loss of evaluation: run.metric_for_best_model has eval/accuracy, eval/reward, ...")
    found = _metric_of(f)
    if found is None:
        return impossible("the metrics are those of metrics.jsonl; set run.metric_for_best_model")
    return mapped(run__metric_for_best_model=found)


def best(value: Any, f: Foreign) -> Outcome:
    if not value:
        return mapped(run__load_best_model_at_end=False)
    if f["eval_strategy"] == "no":
        return impossible("nothing is evaluated: give run.eval_steps, and run.metric_for_best_model eval/accuracy")
    why = "" if _metric_of(f) else "there is no loss of evaluation to compare steps by"
    metric = _metric_of(f) or "eval/accuracy"
    return mapped(why, run__load_best_model_at_end=True, run__metric_for_best_model=metric)


def greater(value: Any, f: Foreign) -> Outcome:
    if _metric_of(f) is None:
        return ignored("of a metric that is not here")
    return mapped(run__greater_is_better=value)


def upload(value: Any, f: Foreign) -> Outcome:
    if not value:
        return ignored("nothing is uploaded unless asked")
    if "/" not in str(f["hub_model_id"]):
        return impossible("the owner is not in the file: give run.push_to_hub true and run.hub_model_id owner/name")
    private = f["hub_private_repo"]
    chosen = {} if private is None else {"run__hub_private_repo": private}
    return mapped(run__push_to_hub=True, run__hub_model_id=f["hub_model_id"], **chosen)
