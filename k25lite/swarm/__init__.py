"""Agent Swarm: an orchestrator, its sub-agents, what they may use, and the trace that tells all they did."""

from k25lite.swarm.agent import Agent as Agent
from k25lite.swarm.agent import Result as Result
from k25lite.swarm.context import DiscardAll as DiscardAll
from k25lite.swarm.context import Summarise as Summarise
from k25lite.swarm.limits import Limits as Limits
from k25lite.swarm.orchestrator import Orchestrator as Orchestrator
from k25lite.swarm.policy import Policy as Policy
from k25lite.swarm.policy import Reply as Reply
from k25lite.swarm.policy import ScriptedPolicy as ScriptedPolicy
from k25lite.swarm.policy import ToolCall as ToolCall
from k25lite.swarm.policy import call as call
from k25lite.swarm.tools import Tool as Tool
from k25lite.swarm.trace import Trace as Trace
from k25lite.swarm.trace import read_trace as read_trace
