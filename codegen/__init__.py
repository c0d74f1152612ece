"""What stands between the GEMMs, as expressions, and the code made from it. Needs no GPU and no torch.cuda."""
