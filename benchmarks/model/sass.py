"""Machine code of NVIDIA's GPUs (SASS): instructions with what they wait for, and a warp's path through them.

The disassemblers print the 128 bits of an instruction beside it. Bits 105 to 125 hold what the hardware does
not find out by itself: for how many cycles the next instruction is held back, which of six scoreboards this
one releases when its result is there, which when its operands are read, and which it waits for.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/\s*\n\s*/\* 0x([0-9a-f]{16}) \*/"
)
LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)

Range = tuple[int, int]  # the first address and the last


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel."""

    address: int
    predicate: str  # such as @!P0; "" for none
    operation: str  # such as LDG.E.128
    operands: str
    target: int | None  # of a branch
    stall: int  # cycles until the warp's next instruction
    when_written: int | None  # scoreboard that it releases when its result is there
    when_read: int | None  # scoreboard that it releases when its operands are read
    waits: tuple[int, ...]  # scoreboards

    @property
    def name(self) -> str:
        """The operation without its modifiers."""
        return self.operation.partition(".")[0]

    @property
    def is_conditional(self) -> bool:
        """Whether it may do nothing; a branch may have its predicate among the operands."""
        return bool(self.predicate or re.match(r"!?U?P\w+,", self.operands))

    @property
    def goes_back(self) -> bool:
        """Whether it ends a loop."""
        return self.target is not None and self.target < self.address


def parse(text: str) -> list[Instruction]:
    """The instructions of a function, printed by `nvdisasm -c -hex` or `cuobjdump -sass`."""
    # nvdisasm names the targets of branches by labels, cuobjdump by addresses.
    labels = {}
    for match in LABEL.finditer(text):
        following = LINE.search(text, match.end())
        if following:
            labels[match[1]] = int(following[1], 16)
    instructions = []
    for match in LINE.finditer(text):
        words = re.fullmatch(r"(@!?U?P\w+\s+)?(\S+)\s*(.*)", match[2])
        assert words is not None  # it matches every line
        predicate, operation, operands = words.groups()
        control = int(match[4], 16) >> 41
        target = None
        # BRA.DIV is for a warp whose lanes have parted: not one whose path is of interest.
        if operation.startswith("BRA") and operation != "BRA.DIV":
            named = re.search(r"`\((\.L_x_\d+)\)", operands)
            at = re.search(r"0x([0-9a-f]+)$", operands)
            target = labels[named[1]] if named else int(at[1], 16) if at else None
        instructions.append(
            Instruction(
                address=int(match[1], 16),
                predicate=(predicate or "").strip(),
                operation=operation,
                operands=operands,
                target=target,
                stall=control & 15,
                when_written=scoreboard(control >> 5 & 7),
                when_read=scoreboard(control >> 8 & 7),
                waits=tuple(n for n in range(6) if control >> 11 + n & 1),
            )
        )
    return instructions


def scoreboard(number: int) -> int | None:
    """A scoreboard of the six; 7 stands for none."""
    return None if number == 7 else number


def loops(instructions: Sequence[Instruction]) -> list[Range]:
    """Addresses of the loops, in the order of their ends."""
    return [(i.target, i.address) for i in instructions if i.goes_back and i.target is not None]


def innermost_loops(instructions: Sequence[Instruction], operation: str, count: int) -> list[Range]:
    """Those that contain no other loop, and so many instructions whose operation begins like this."""
    ranges = loops(instructions)
    return [
        (first, last)
        for first, last in ranges
        if not any(first <= other and end < last for other, end in ranges)
        and sum(i.operation.startswith(operation) for i in within(instructions, (first, last))) == count
    ]


def around(instructions: Sequence[Instruction], inner: Range) -> Range:
    """The shortest loop that contains these addresses, and more."""
    outer = [(a, b) for a, b in loops(instructions) if a <= inner[0] and inner[1] < b]
    return min(outer, key=lambda loop: loop[1] - loop[0])


def within(instructions: Sequence[Instruction], addresses: Range) -> list[Instruction]:
    """The instructions at these addresses."""
    return [i for i in instructions if addresses[0] <= i.address <= addresses[1]]


def path(instructions: Sequence[Instruction], trips: Mapping[int, int]) -> Iterator[Instruction]:
    """The instructions that a warp executes, in their order.

    Args:
        instructions: of a kernel.
        trips: for each loop, by its number in `loops`, how many times it runs each time it is reached. A
            conditional branch forward is taken where it leads past loops that do not run, and past none that
            does; others, to code for special cases, are not taken.
    """
    places = {instruction.address: place for place, instruction in enumerate(instructions)}
    ranges = loops(instructions)
    done = dict.fromkeys(range(len(ranges)), 0)
    at = 0
    while at < len(instructions):
        instruction = instructions[at]
        yield instruction
        at += 1
        # An endless branch pads the code, and is reached where the last loop's way out is in its middle.
        if (instruction.name == "EXIT" and not instruction.is_conditional) or (
            instruction.target == instruction.address
        ):
            return
        if instruction.target is None:
            continue
        if instruction.goes_back:
            number = ranges.index((instruction.target, instruction.address))
            done[number] += 1
            if done[number] < trips[number]:
                at = places[instruction.target]
            else:
                done[number] = 0
        elif not instruction.is_conditional:
            at = places[instruction.target]
        else:
            skipped = [
                trips[number]
                for number, (first, last) in enumerate(ranges)
                if instruction.address < first and last < instruction.target
            ]
            if skipped and not any(skipped):
                at = places[instruction.target]
