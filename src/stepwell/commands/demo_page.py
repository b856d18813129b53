"""The demo's page: every sentence with a number in it is made from the numbers."""

from collections import Counter
from typing import TYPE_CHECKING

from stepwell.commands.demo_figures import brief, distances, gains, losses, ordered, pair, row_of, sensitivity
from stepwell.recipes.digits import BOTH, LOTION, RTN, SEARCHED, STE, TRAINED
from stepwell.report import Finding, Page, Section, Table
from stepwell.train.compare import FLOAT_BITS, FULL_PRECISION
from stepwell.train.story import SHIPPED_BITS, Claim, Story

if TYPE_CHECKING:
    from stepwell.report.page import Cell


def page(story: Story) -> Page:
    """Return the report."""
    return Page(
        title="Handwritten digits, from full precision to 2 bits",
        lead=_lead(story),
        findings=_findings(story),
        sections=[_loss(story), _rounding(story), _seeds(story), _everything(story), _shipping(story), _method(story)],
        facts=[
            *story.versions.items(),
            ("computing time", f"{story.seconds:.0f} s of one processor core"),
            ("seeds", ", ".join(map(str, story.config.seeds))),
        ],
    )


def _lead(story: Story) -> str:
    """Say what was done, in two sentences."""
    widths = ", ".join(str(bits) for bits, _ in story.config.grids[:-1]) + f" and {story.config.grids[-1][0]}"
    return (
        f"{len(story.config.seeds)} networks were trained on scikit-learn's digits in full precision and taken to {widths} bits per weight "
        f"by rounding (RTN) and by training (STE-QAT, LOTION, both together) with the same number of steps on the same batches. "
        "All numbers are from held-out images that chose nothing: network and budget were settled on other splits of the images, learning "
        "rates on validation images."
    )


def _findings(story: Story) -> list[Finding]:
    """Return the headlines."""
    full = row_of(story, FULL_PRECISION, FLOAT_BITS)
    four, ste, both = row_of(story, RTN, SHIPPED_BITS), row_of(story, STE, 2), row_of(story, BOTH, 2)
    claims = [_claim_finding(story, claim) for claim in story.claims]
    shipped, certificate = story.shipped, story.shipped.certificate
    same = bool(certificate.codes_equal and certificate.scales_equal)
    return [
        Finding(f"{100 * full.accuracy.mean:.1f} %", f"Accuracy in full precision, at a loss of {brief(full.loss.mean)} nats per image."),
        Finding(
            f"{brief(full.loss.mean)} → {brief(four.loss.mean)}",
            f"Loss from full precision to {SHIPPED_BITS} bits by rounding alone: {100 * four.accuracy.mean:.1f} % accuracy remain.",
        ),
        *claims,
        Finding(
            f"{brief(ste.randomized_loss.mean)} → {brief(both.randomized_loss.mean)}",
            f"Loss at 2 bits if weights are rounded at random, from {STE} to {BOTH}; {RTN} is at "
            f"{brief(row_of(story, RTN, 2).randomized_loss.mean)}, {LOTION} at {brief(row_of(story, LOTION, 2).randomized_loss.mean)}.",
        ),
        Finding(
            "codes identical" if same else "codes DIFFER",
            f"What onnxruntime loaded and what was trained, for the {shipped.bits}-bit {shipped.arm} network; its logits are within "
            f"{certificate.max_relative_error:.0e} of PyTorch's.",
            "good" if certificate.passed else "bad",
        ),
    ]


def _claim_finding(story: Story, claim: Claim) -> Finding:
    """Return one claim as a headline, next to the baseline that costs nothing."""
    searched = row_of(story, SEARCHED, claim.bits)
    return Finding(
        f"{brief(claim.rtn_loss)} → {brief(claim.loss)}",
        f"Loss at {claim.bits} bits, from RTN to {claim.arm}, the trained method that validation picks: a gain of "
        f"{claim.gain.sigmas:.1f} standard errors. Searching RTN's scales alone gives {brief(searched.loss.mean)}.",
        "good" if claim.holds else "bad",
    )


def _loss(story: Story) -> Section:
    """Loss against width, under both roundings."""
    return Section("What each method loses as bits get fewer", figures=losses(story))


def _rounding(story: Story) -> Section:
    """The trade-off between methods, and where their weights lie."""
    ste, lotion, both = (row_of(story, arm, 2) for arm in (STE, LOTION, BOTH))
    order = [row.arm for row in sorted((ste, lotion, both), key=lambda row: row.loss.mean)]
    ratio = ste.randomized_loss.mean / lotion.randomized_loss.mean
    verdict = (
        f"If the rounding is random or unknown, {STE} is the wrong choice: its loss is then {ratio:.1f} times that of {LOTION}, because "
        "it trains the weights for one particular rounding and lets them rest anywhere between two grid values. "
        f"{LOTION} pulls weights onto the grid, so that less is left to round; {BOTH} has some of each."
        if ratio > 1
        else f"In this run {STE} is not worse than {LOTION} under randomized rounding either ({ratio:.2f} times its loss)."
    )
    return Section(
        "STE or LOTION: which to take",
        paragraphs=[
            f"If the runtime rounds to nearest, 2 bits are best reached by {order[0]}; {order[1]} follows, then {order[2]} "
            f"({pair(ste.loss)} for {STE}, {pair(lotion.loss)} for {LOTION}, {pair(both.loss)} for {BOTH}). " + verdict,
            f"At 3 bits and randomized rounding the order is {ordered(story, 3, lambda row: row.randomized_loss)}; to nearest, "
            f"{ordered(story, 3, lambda row: row.loss)}.",
        ],
        figures=[sensitivity(story), distances(story)],
    )


def _seeds(story: Story) -> Section:
    """Every seed's gain, and the accuracy."""
    arms = (SEARCHED, *TRAINED)
    return Section(
        "Is the gain real?",
        paragraphs=[
            "Each point is one network: RTN's loss minus the method's, both starting from the same full-precision network and trained on "
            "the same batches. Points above zero are gains. RTN with searched scales costs no training, so it belongs in the picture."
        ],
        figures=[gains(story, bits, arms) for bits in (3, 2)],
    )


def _everything(story: Story) -> Section:
    """The full table."""
    columns = [
        "bits",
        "method",
        "loss, nearest (nats)",
        "accuracy, nearest",
        "loss, randomized (nats)",
        "accuracy, randomized",
        "gain (se)",
    ]
    rows: list[list[Cell]] = [
        [
            row.bits,
            row.arm,
            pair(row.loss),
            f"{100 * row.accuracy.mean:.1f} %",
            pair(row.randomized_loss),
            f"{100 * row.randomized_accuracy.mean:.1f} %",
            None if row.arm in (FULL_PRECISION, RTN) else f"{row.gain.sigmas:+.1f}",
        ]
        for row in story.rows
    ]
    lowest = [min((index for index, row in enumerate(story.rows) if row.bits == bits), key=lambda index: story.rows[index].loss.mean)
              for bits, _ in story.config.grids]  # fmt: skip
    caption = "Means over seeds ± one standard error; lowest loss per width in bold; gain over RTN in its own standard errors."
    return Section("All results", tables=[Table(columns, rows, caption, lowest, grouped=True)])


def _shipping(story: Story) -> Section:
    """The exported network."""
    shipped, certificate = story.shipped, story.shipped.certificate
    rows: list[list[Cell]] = [
        ["network", f"{shipped.arm}, {shipped.bits} bits, seed {shipped.seed}: {100 * shipped.accuracy:.1f} % of test images right"],
        ["runtime", f"{certificate.runtime} {certificate.version}"],
        ["operator", "com.microsoft.MatMulNBits, blocks of 32 inputs"],
        ["codes equal", "yes" if certificate.codes_equal else "NO"],
        ["scales equal", "yes" if certificate.scales_equal else "NO"],
        [
            "largest difference of logits",
            f"{certificate.max_relative_error:.1e} of the largest logit (allowed {certificate.tolerance:.1e})",
        ],
        ["same digit predicted", f"{100 * (certificate.top1_agreement or 0.0):.1f} % of test images"],
        ["quantized weights", f"{shipped.weights}: {shipped.float_bytes} B in float32, {shipped.stored_bytes} B as codes and scales"],
        ["size of the ONNX file", f"{shipped.file_bytes} B (graph and biases included)"],
    ]
    verdict = "passes" if certificate.passed else "does NOT pass"
    text = (
        f"The {shipped.bits}-bit network with the lowest validation loss was exported as ONNX on onnxruntime's grid (the one "
        f"it was made for), read back, and run on all test images. It {verdict}: codes, scales and logits were compared."
    )
    return Section("What runs is what was trained", [text], tables=[Table(["", "onnxruntime against PyTorch"], rows)])


def _method(story: Story) -> Section:
    """What was done, so that somebody else can judge it."""
    config = story.config
    rates = ", ".join(f"{lr:g}" for lr in config.lrs)
    picked: list[list[Cell]] = [[row.bits, row.arm, f"{row.lr:g}", row.validation_loss] for row in story.rows]
    return Section(
        "How it was done",
        paragraphs=[
            "1797 images of 8 x 8 pixels: 997 for training, 250 for choosing, 550 for reporting, the same split in every run. "
            f"The network has layers of {' - '.join(map(str, config.widths))} units with leaky ReLUs. All weight matrices are quantized, "
            "biases are not. "
            f"AdamW, batches of {config.batch} images, each shifted by up to a pixel and with noise added; {config.base_steps} steps "
            "in full precision.",
            f"From there every method got {config.steps} more steps on identical batches, the learning rate falling to zero, and so did "
            f"full precision; RTN rounds that longer-trained network. Learning rates tried for every method: {rates}; the one with the "
            "lowest mean validation loss under nearest rounding was taken. LOTION's strength was not tuned: it is its theory's. "
            + beyond_bound(story),
            f"Weights share one scale per 32 inputs. The {SHIPPED_BITS}-bit grid is onnxruntime's (-8 to 7, signed scale), the others are "
            f"symmetric; 2 bits are the three values -1, 0, 1. Randomized losses are means over {config.draws} draws, the same random "
            "numbers for every method. The test images are few: differences below about one standard error say nothing.",
        ],
        tables=[Table(["bits", "method", "learning rate taken", "validation loss (nats)"], picked, grouped=True)],
    )


def beyond_bound(story: Story) -> str:
    """Say in how many runs the penalty exceeded its stability bound; nothing where it never did."""
    counted = Counter((trial.arm, trial.bits) for trial in story.trials if trial.beyond_bound)
    if not counted:
        return ""
    runs = len(story.config.seeds) * len(story.config.lrs)
    told = ", ".join(f"{count} of {runs} runs of {arm} at {bits} bits" for (arm, bits), count in sorted(counted.items()))
    return f"In {told} the penalty exceeds its stability bound: there it decides where weights go, more than the task does."
