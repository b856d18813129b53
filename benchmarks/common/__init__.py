"""What every benchmark says about where it ran."""

import platform
from pathlib import Path


def processor() -> str:
    """Return the processor's name, as the operating system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or "unknown processor"])[0]
