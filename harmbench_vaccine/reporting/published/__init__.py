"""Figures that papers print, compared with measured ones."""
