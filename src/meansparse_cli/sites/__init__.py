"""Where operators can stand: found by running the model, chosen by rules.

find          every site of a model
trace         one forward pass, followed: which activations are called, by whom, on what
foreign       what a network's own code does unseen: it raises, uses loose weights, runs scripted code
activations   what counts as an activation
channels      which axis of a feature is the channel
residual      where a site stands to the residual additions
rules         ``--sites``: which of the sites are used
"""
