"""The stages. ``BUILTIN`` is the table of passes: name -> import path."""

BUILTIN: dict[str, str] = {
    "recover": "edgesmith.passes.train.recover:Recover",
    "select-student": "edgesmith.passes.distill.select:SelectStudent",
    "equalise": "edgesmith.passes.quantize.equalise:Equalise",
    "fold-batch-norm": "edgesmith.passes.graph.fold_batch_norm:FoldBatchNorm",
    "fold-constants": "edgesmith.passes.graph.fold_constants:FoldConstants",
    "prune": "edgesmith.passes.prune.prune:Prune",
    "qat": "edgesmith.passes.quantize.qat:Qat",
    "quantize": "edgesmith.passes.quantize.quantize:Quantize",
}
