"""The MeanSparse operator: what it computes, where it stands in a model, where its numbers come from.

function      out = mean where abs(in - mean) <= threshold, else in; and what a gradient meets there
shapes        other rules than the paper's for what lies near the mean
module        the operator of one site, a module: alpha becomes a threshold, alpha * std (``MeanSparse.threshold``)
insertion     operators into a model and out again
active        for a while: another alpha, one for each site or each example, another derivative, or the base model
statistics    mean and std of a channel, from sums that merge
calibration   one pass over a split, statistics at every site; ``shared_pass``: by several workers
checkpoint    sites, statistics and alpha in a file, and a model with them
observe       operators watched at work
defence       any other module of a network as a defence
device        where a model computes, and in what float32; ``fitting``: batches as large as its memory takes
kernels       the operator and the sums of the statistics on a GPU
"""
