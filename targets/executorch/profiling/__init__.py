"""Reading, extending and cutting ``.pte`` files with the standard library and what ExecuTorch's package brings: it goes where runner.py goes.

The modules here import each other relatively, because the runner loads this folder by its place, without edgesmith.
"""
