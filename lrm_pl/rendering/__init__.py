"""Volume rendering. The entry point is ``renderer.Renderer``."""
