"""`sparring export`: a trained model as a file for other programs, checked by its predictions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparring.app.chosen import Checkpoint, ModelText, chosen

ENDINGS = {"torch.export": ".pt2", "onnx": ".onnx"}
TOLERANCE = 1e-3
"""By how much a logit may differ, as a share of the largest: other programs sum in another order."""
NUM_EXAMPLES = 100


def export_(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    to: Annotated[Literal["torch.export", "onnx"], typer.Option(help="the format")] = "torch.export",
    out: Annotated[Path | None, typer.Option(help="the file to write (default: RUN/model.pt2 or .onnx)")] = None,
    data: Annotated[str | None, typer.Option(help="what it is checked on (default: the run's data)")] = None,
    model: ModelText = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Write a trained model for other programs; the file is read again, and must predict what the model predicts."""
    out = out or run / f"model{ENDINGS[to]}"
    if out.suffix != ENDINGS[to] or out.is_dir():
        raise ValueError(f"--out {out}: expected a file that ends in {ENDINGS[to]}, as {to} has them")
    subject, given = chosen(run, model, None, checkpoint, {"data": data} if data else {}, "")
    from sparring.modalities import find_data

    examples = find_data(given["data"]).data.batches("test", NUM_EXAMPLES, NUM_EXAMPLES)
    x = next(iter(examples))[0]
    same, gap = export_model(subject.model, x, out, to)
    typer.echo(f"{out}: {to}; of {len(x)} examples {same} are taken for the same class, logits are within {gap:.1g}")


def export_model(model: Any, x: Any, out: Path, to: str) -> tuple[int, float]:
    """Writes the file; how many of x (B, *X) it takes for the same class, and the largest difference of a logit.

    The batch may have any size in the file. Raises ValueError, and leaves no file, where the format cannot hold the
    model or does not predict the same; ImportError where its package is not there.
    """
    import torch

    from sparring.core.files import write_atomically

    if not isinstance(x, torch.Tensor) or len(x) < 3:
        raise ValueError("an export takes models of one tensor, and at least three examples to check it on")
    model = model.cpu().eval()
    with torch.no_grad():
        expected = model(x)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            content = (_as_onnx if to == "onnx" else _as_torch_export)(model, x[:2])
            found = (_run_onnx if to == "onnx" else _run_torch_export)(content, x)
    except ImportError:
        raise
    except Exception as error:  # the exporters have many kinds
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{to} cannot hold this model ({type(error).__name__}: {first_line}); what depends on values in Python, "
            "such as `if x.sum() > 0`, has no place there. Its weights are in the run folder, as .safetensors"
        ) from error
    gap = float((found - expected).abs().max())
    if not gap <= TOLERANCE * float(expected.abs().max().clamp_min(1)):
        raise ValueError(f"{to} predicts otherwise than the model: logits differ by {gap:.3g}; nothing was written")
    write_atomically(out, lambda stream: stream.write(content))
    return int((found.argmax(1) == expected.argmax(1)).sum()), gap


def _as_torch_export(model: Any, x: Any) -> bytes:
    import io

    import torch

    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return stream.getvalue()


def _run_torch_export(content: bytes, x: Any) -> Any:
    import io

    import torch

    with torch.no_grad():
        return torch.export.load(io.BytesIO(content)).module()(x)


def _as_onnx(model: Any, x: Any) -> bytes:
    import io

    import torch

    _onnx()
    stream = io.BytesIO()
    torch.onnx.export(
        model, (x,), stream, dynamo=False,  # type: ignore[arg-type]  # which takes streams
        input_names=["x"], output_names=["logits"],
        dynamic_axes={"x": {0: "batch"}, "logits": {0: "batch"}},
    )  # fmt: skip
    return stream.getvalue()


def _run_onnx(content: bytes, x: Any) -> Any:
    """Run by ONNX's own reference, which shares no code with PyTorch."""
    import torch

    onnx = _onnx()
    reference = onnx.reference.ReferenceEvaluator(onnx.load_from_string(content))
    return torch.from_numpy(reference.run(None, {"x": x.numpy()})[0])


def _onnx() -> Any:
    try:
        import onnx
        import onnx.reference
    except ImportError as error:
        raise ImportError("writing ONNX needs onnx: pip install 'sparring[onnx]'") from error
    return onnx
