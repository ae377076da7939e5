"""`guidekit sample` with a tiny real model: runs that must work, and what refusals look like."""

from plans import run

PROMPT = "a red circle and a blue square on white"
SEGMENTS = ("red circle=0,0,0.5,0.5", "blue square=0.5,0.5,1,1")


def draw(model, *args, steps=2, seeds="0-1", segments=SEGMENTS):
    """A short run of `sample` that must work."""
    places = [word for segment in segments for word in ("--segment", segment)]
    result = run(
        "sample",
        "--model",
        model,
        "--prompt",
        PROMPT,
        "--steps",
        steps,
        "--seeds",
        seeds,
        *places,
        "--out",
        "o",
        *args,
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def fails(result, text, code=2):
    """Checks the exit code and the one line on stderr."""
    assert result.exit_code == code, (result.output, result.exception)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert text in result.stderr
    assert "Traceback" not in result.output


def pictures(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}
