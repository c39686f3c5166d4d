"""One HTML file about one or several runs: curves, settings, alarms, time, and a browser of rollouts.

The file stands alone: it loads nothing and sends nothing (its content security policy forbids both), and every text of
a run is data in it, never markup.  Charts are drawn by plotly.js, which comes with the package ``plotly``.
"""

from vpd.report.html.page import Options, write_report
from vpd.report.html.watch import runs_in, watch

__all__ = ["Options", "runs_in", "watch", "write_report"]
