"""Training stages, one module each. So far: the ViT stage."""
