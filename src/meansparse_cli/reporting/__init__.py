"""What people see of a run: terminal tables, Markdown, HTML, figures. Nothing is computed here.

Read ``render`` first: what a page about a run says, in whatever form. ``table`` is the one table, ``console`` prints.
"""
