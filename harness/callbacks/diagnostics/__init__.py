"""What can be measured of gradients and updates beside the losses: noise, curvature, sizes, spectra. Off by default."""
