"""Training drafters for a model from text that the model writes itself: data, one trainer, its objectives."""
