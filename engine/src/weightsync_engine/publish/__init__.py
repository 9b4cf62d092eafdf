"""The trainer's side of an agent: takes versions over a Unix socket, keeps copies of them.

``protocol`` and ``channel`` are what both ends speak and import nothing but the standard library and the contract;
``server`` and ``store`` run in the agent.
"""
