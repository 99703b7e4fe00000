"""Where things lie: models, files written whole, and what is kept between runs.

Imports no other wing.
"""
