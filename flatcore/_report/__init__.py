"""From a model and a loader to a report: rows, statistics, pages and pictures. No formulas."""
