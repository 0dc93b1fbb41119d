"""The report page: results, charts, sections, HTML."""
