"""Ship: from a checkpoint to a runtime's own file and a certificate: the work behind `stepwell quantize`, `verify` and `inspect`."""
