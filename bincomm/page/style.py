"""The look of the page: its style sheet, and the colors of its figures."""

BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#8a8a8a"  # of Okabe and Ito, distinct for the color-blind
CLASS_COLORS = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e6ab02", "#56b4e9", "#7a3e9d",
    "#8c564b", "#000000", "#66a61e", "#e7298a", "#1b4f72", "#b15928", "#17becf",
    "#a6761d", "#fb9a99", "#6a7b00", "#b2abd2", "#b2182b", "#35978f",
]  # fmt: skip
OTHER_CLASSES = "#c4c4c4"
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --quiet: #4a4a4a }
:root { --line: #d9d9d9; --tile: #f3f5f7; --note: #fff6df; --good: #00664a; --bad: #a33a00 }
@media (prefers-color-scheme: dark) {
  :root { --page: #17191c; --ink: #e8e8e8; --quiet: #b5b5b5 }
  :root { --line: #41464c; --tile: #26292e; --note: #3b3215; --good: #4ccfa4; --bad: #ff9a62 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 48rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem }
p { margin: .4rem 0 }
.tiles { display: grid; gap: .6rem; margin: 1rem 0 }
.tiles { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)) }
.tile { background: var(--tile); border-radius: .4rem; padding: .6rem .7rem }
.tile b { display: block; font-size: 1.25rem; line-height: 1.3 }
.tile span { font-size: .85rem; line-height: 1.3; display: block }
.note { background: var(--note); border-left: 4px solid #e6ab02; padding: .5rem .8rem; margin: .8rem 0 }
.small { font-size: .85rem; color: var(--quiet) }
.scroll { overflow-x: auto; margin: .6rem 0 }
.tall { max-height: 28rem; overflow-y: auto }
figure { margin: .8rem 0 }
figure img { display: block; width: 100%; max-width: 34rem; height: auto; border-radius: .3rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
table { overflow-wrap: normal }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { background: var(--page); position: sticky; top: 0; white-space: normal; vertical-align: bottom }
th:first-child, td:first-child { text-align: left }
.strip { display: grid; grid-template-columns: 1.2rem 1fr; align-items: center; margin: .9rem 0 }
.strip b { font-size: 1.1rem }
.strip div { display: grid; grid-template-columns: repeat(8, minmax(0, 72px)); gap: 4px }
.strip img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 3px; background: var(--tile) }
@media (max-width: 34rem) { .strip div { grid-template-columns: repeat(4, minmax(0, 1fr)) } }
.pictures { display: grid; gap: 4px; margin: .3rem 0 .6rem }
.pictures { grid-template-columns: repeat(8, minmax(0, 72px)) }
.pictures img, .query img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 3px }
@media (max-width: 34rem) { .pictures { grid-template-columns: repeat(4, minmax(0, 1fr)) } }
.query { display: grid; grid-template-columns: 4.5rem minmax(0, 1fr); gap: .8rem; margin: 1rem 0 }
.query .pictures { grid-template-columns: repeat(6, minmax(0, 72px)) }
.query span { display: block; font-size: .85rem; line-height: 1.3 }
.panel { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 1.2rem }
@media (min-width: 44rem) { .panel { grid-template-columns: minmax(0, 11fr) minmax(0, 9fr) } }
.findings { list-style: none; padding: 0 }
.findings li { display: grid; grid-template-columns: 1.4rem minmax(0, 1fr); margin: .5rem 0 }
.findings .good > b { color: var(--good) }
.findings .bad > b { color: var(--bad) }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .9rem }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .35em }
.legend i { outline: 1px solid var(--line) }
summary { cursor: pointer; padding: .5rem 0 }
"""
