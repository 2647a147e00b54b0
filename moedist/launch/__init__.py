"""From a command line to running ranks: compose once, decode, validate, make the run folder, start the ranks.

In the order in which a command goes through the room:

- what is asked for: `choices` finds the modules that a group may choose, `compose` lets Hydra compose, `decode` makes
  typed configs of plain mappings, `keys` lists all of it for completion;
- whether it can be: `validate` checks the parts against each other and the world, `node_groups` fits routing groups to
  nodes, `resume` looks at the checkpoint to go on from, `examine` at this machine;
- where it lies: `folder` claims the run folder, `saved` writes and reads its ``config.yaml``;
- who runs it: `nodes` finds this machine among others, `environment` sets the ranks' variables, `start` starts torchrun
  and says how it ended, `process` leaves no process behind;
- commands that start ranks for something else than training: `evaluation`, `parity`, `rank_check`;
- many runs: `sweep`.
"""
