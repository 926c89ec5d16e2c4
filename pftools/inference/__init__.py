"""Statistics of paired results when trainings and texts are both samples: arrays in, numbers out,
nothing about studies.

crossed          the mean of paired differences (seeds x blocks), its interval and p-value
confidence_set   the set that holds the best of several orderings
equivalence      whether a difference is smaller than a margin that the reader sets
looks            when results are looked at, and the level of each look
sequential       looks at growing numbers of seeds that share one level
power            which difference a number of seeds and blocks can show
"""
