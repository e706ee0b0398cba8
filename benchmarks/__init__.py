"""Measurements of karst-hub; each module runs by itself and checks its results before it times anything."""
