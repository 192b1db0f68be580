"""A local page on which a person sorts unknown images into classes: `sdlora-edge label`."""
