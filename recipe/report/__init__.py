"""`recipe report` and `recipe compare`: what a run's folder holds, as one HTML file that needs nothing else.

Curves are drawn by bokeh, whose JavaScript is inlined; texts by Jinja, which escapes all that comes out of data.
"""
