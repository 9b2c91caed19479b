"""Hours of game footage: record real play with its exact events, find them again from pictures, report them.

`record` makes footage: `doom` runs the game, `player` plays it, `events` says what happened when.
"""
