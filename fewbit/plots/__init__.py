"""All code that uses matplotlib. Functions return a Figure; the caller shows or saves it."""

from fewbit.plots.ratios import RatioPanels, plot_ratios
from fewbit.plots.style import save
from fewbit.plots.tables import plot_errors, plot_gallery, plot_tables
from fewbit.plots.training import plot_training

__all__ = ["RatioPanels", "plot_errors", "plot_gallery", "plot_ratios", "plot_tables", "plot_training", "save"]
