"""What authors of passes and targets test with; see ``edgesmith.compiler.testing``."""

from edgesmith.compiler.testing import CountedBench, TinyConvNet, TinyTransformer, check_pass, check_target, randomise_norms, tiny_data, tiny_model

__all__ = ["CountedBench", "TinyConvNet", "TinyTransformer", "check_pass", "check_target", "randomise_norms", "tiny_data", "tiny_model"]
