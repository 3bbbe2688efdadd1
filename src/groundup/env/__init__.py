"""The environment stage: what this machine is, and which build of torch fits it.

Standard library only, usable before torch exists and on older Pythons than the rest of groundup (3.8+), so that the
question "what is wrong here" has an answer exactly where nothing else runs. It refuses to import torch in its own process:
a torch that crashes or hangs on import must be a fact in the report, not the end of it.

    probe.facts()            what is here                      (dict, ready for JSON)
    plan.make_plan()         which torch to install, and why   (pure: facts in, Plan out)
    verify.verify()          does that torch compute           (imports torch: run it in the environment to be judged)
    cli.main()               `groundup env ...`, `python -m groundup.env ...`, `python start.py env ...`
"""
