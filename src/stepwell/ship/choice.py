"""Choice: which method to use where the user leaves it open, after `advise`, and why."""

from stepwell.advice.advise import advise
from stepwell.advice.verdict import WORDS, Verdict, decide
from stepwell.ship.plan import Plan
from stepwell.ship.records import Choice
from stepwell.ship.rounding import Progress
from stepwell.ship.source import Source

NAMES = {"RTN": "rtn", "GPTQ": "gptq", "train": "default", "not reachable": "default"}
NEXT = {"RTN": "gptq", "GPTQ": "default", "train": "default"}  # where it is uncertain whether a method is enough, the next one is taken
CALIBRATING = 32  # batches that GPTQ, the curvature of scales and `advise` see at most; training sees all
TRAINED = ("ste", "lotion", "default")
METHODS = ("auto", "rtn", "search", "gptq", *TRAINED)


def choose(source: Source, plan: Plan, tolerance: float, *, rate: float, progress: Progress) -> Choice:
    """Ask `advise` on the source's data and return the method that it leads to.

    Where it is uncertain whether a method is enough, one that surely is enough is taken, else the next stronger one.
    """
    done = 0

    def tell(words: str) -> None:
        nonlocal done
        done += 1
        progress(f"advice: {words}", done, done + 1)

    verdict = advise(
        source.model, source.loss, source.measuring,
        quantizers=[plan.choices], tolerance=tolerance, calibration=source.learning[:CALIBRATING], rate=rate, on_step=tell,
    )[0]  # fmt: skip
    return method_for(verdict, tolerance)


def method_for(verdict: Verdict, tolerance: float) -> Choice:
    """Turn a verdict into a method."""
    said = f"advise: {WORDS[verdict.method]}, expected increase {verdict.predicted:+.2g} ({verdict.low:.2g} to {verdict.high:.2g})"
    if verdict.method != "uncertain":
        method, then = NAMES[verdict.method], tuple[str, ...]()
        if verdict.method == "not reachable":
            then = ("training is tried all the same: nothing stronger is known here; more bits may be what is needed",)
    elif verdict.safe is not None:
        method, then = NAMES[verdict.safe], (f"{verdict.safe} is surely enough",)
    else:
        candidate = decide(verdict.estimates, tolerance, share=verdict.share)[1].method
        method, then = NEXT[candidate], (f"whether {candidate} is enough is uncertain, so the next stronger method was taken",)
    return Choice(method, (said, *then, *verdict.reasons))
