"""All of matplotlib: functions give a Figure and leave showing to others."""

from fewbit.plots.style import save
from fewbit.plots.tables import RatioPanels, plot_errors, plot_gallery, plot_losses, plot_ratios, plot_tables

__all__ = ["RatioPanels", "plot_errors", "plot_gallery", "plot_losses", "plot_ratios", "plot_tables", "save"]
