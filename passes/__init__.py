"""The stages. ``BUILTIN`` is the table of passes: name -> import path."""

BUILTIN: dict[str, str] = {
    "quantize": "edgesmith.passes.quantize.quantize:Quantize",
}
