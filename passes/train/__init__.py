"""The one training loop on a captured graph, its losses, and recovery by distillation."""
