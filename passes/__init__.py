"""Graph in, graph out: one pass, one file, one public function. Knows FX, not CUDA."""
