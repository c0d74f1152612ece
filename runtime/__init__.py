"""What runs: the operators `torch.ops.moecompile.*`, their torch reference and their autograd."""
