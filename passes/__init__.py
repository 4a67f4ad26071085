"""The stages. ``BUILTIN`` is the table of passes: name -> import path."""

BUILTIN: dict[str, str] = {
    "fold-batch-norm": "edgesmith.passes.graph.fold_batch_norm:FoldBatchNorm",
    "fold-constants": "edgesmith.passes.graph.fold_constants:FoldConstants",
    "quantize": "edgesmith.passes.quantize.quantize:Quantize",
}
