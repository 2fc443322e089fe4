"""The HTML document of the annotation report, as a `string.Template`."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title: annotation report</title>
<style>
:root { color-scheme: light dark; --text: #1d1f22; --muted: #666b72; --faint: #e3e5e8; --page: #fff; --card: #fafafa;
  --low: #e08a4b; --middle: #cdcdc8; --high: #5b9bd1; --bar: #8b93a0; --very-low: rgb(233,106,66); }
$light_shades
@media (prefers-color-scheme: dark) {
:root { --text: #e4e6e9; --muted: #9aa0a8; --faint: #34373c; --page: #16181b; --card: #1c1e22;
  --low: #cf7434; --middle: #6b6e73; --high: #4f94d4; --bar: #7d8694; --very-low: rgb(178,48,26); }
$dark_shades
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", sans-serif;
  color: var(--text); background: var(--page); max-width: 72rem; margin: 0 auto; padding: 1.6rem 1.2rem 3rem;
  -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .2rem; padding-top: .9rem; border-top: 1px solid var(--faint); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .2rem 0 .8rem; max-width: 62rem; }
.kicker { color: var(--muted); font-size: .85rem; margin: 0; }
.note { color: var(--muted); font-size: .9rem; }
.overview { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem 2.5rem; align-items: start; margin-top: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.figures { width: 100%; }
.figures th, .figures td { padding: .28rem 0 .28rem 1rem; text-align: right; border-bottom: 1px solid var(--faint);
  font-weight: normal; vertical-align: top; }
.figures th:first-child { text-align: left; padding-left: 0; }
.figures thead th { color: var(--muted); font-size: .85rem; }
.figures td, .bands tbody th { white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; margin: 0 0 1.2rem; }
dt, dd { margin: 0; padding: .28rem 0; border-bottom: 1px solid var(--faint); }
dt { color: var(--muted); padding-right: 1.2rem; }
dd { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem 2.5rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; color: var(--muted); }
figcaption b { display: block; font-weight: 600; font-size: .93rem; color: var(--text); }
.plot { display: block; overflow: visible; height: 170px; width: calc(100% - 3.2rem); margin: 1.6rem .4rem 2.9rem 2.8rem;
  font-size: 12px; font-variant-numeric: tabular-nums; }
.plot text { fill: var(--muted); }
.plot .end { text-anchor: end; }
.plot .middle { text-anchor: middle; }
.grid { stroke: var(--faint); }
.axis { stroke: var(--muted); }
.mean { stroke: var(--text); stroke-dasharray: 3 3; pointer-events: none; }
.column { fill: transparent; }
g:hover .column { fill: var(--faint); }
.band0 { fill: var(--low); background: var(--low); }
.band1 { fill: var(--middle); background: var(--middle); }
.band2 { fill: var(--high); background: var(--high); }
.row-bar { fill: var(--bar); }
.bands { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem 2.5rem; align-items: center; margin-bottom: 1.5rem; }
.stack { display: flex; height: 1.5rem; border-radius: 3px; overflow: hidden; margin-bottom: .5rem; }
.stack-name { font-size: .85rem; color: var(--muted); }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .55em; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; align-items: center; font-size: .85rem; margin: .6rem 0 1rem;
  color: var(--muted); }
.legend .t { color: var(--text); }
.scale { display: flex; gap: .5rem; align-items: center; }
.ramp { display: flex; width: 12rem; height: 1rem; border-radius: 3px; overflow: hidden; border: 1px solid var(--faint); }
.ramp span { flex: 1; }
.example { margin: 0 0 .8rem; border: 1px solid var(--faint); border-radius: 6px; background: var(--card); }
.example summary { padding: .45rem .8rem; cursor: pointer; font-variant-numeric: tabular-nums; }
.example summary span { display: inline-block; color: var(--muted); margin-left: 1rem; }
.text { padding: .6rem .8rem; max-height: 19rem; overflow: auto; border-top: 1px solid var(--faint); }
.text, .context { font: 13px/1.65 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono",
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { border-radius: 2px; margin-right: 1px; padding: .1em 0; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; }
.very-low { background: var(--very-low); }
.part { padding: .1em .25em; }
.focus { outline: 2px solid var(--text); outline-offset: 1px; font-weight: 700; }
.prompt, .gap { color: var(--muted); }
.gap { font-style: italic; }
.lowest { width: 100%; }
.lowest th { text-align: right; color: var(--muted); font-size: .85rem; font-weight: normal; padding: .28rem .9rem .28rem 0;
  border-bottom: 1px solid var(--faint); }
.lowest th:last-child { text-align: left; }
.lowest td { text-align: right; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--faint);
  white-space: nowrap; vertical-align: top; }
.lowest .context { text-align: left; white-space: pre-wrap; width: 100%; padding-right: 0; }
@media (max-width: 48rem) {
  .overview, .plots, .bands { grid-template-columns: minmax(0, 1fr); }
  .example summary span { margin-left: 0; margin-right: .7rem; }
  .example summary b { display: inline-block; margin-right: .7rem; }
  .lowest thead { display: none; }
  .lowest tr { display: flex; flex-wrap: wrap; gap: 0 .9rem; padding: .5rem 0; border-bottom: 1px solid var(--faint); }
  .lowest th:last-child { text-align: left; }
.lowest td { border: 0; padding: 0; }
  .lowest td[data-label]::before { content: attr(data-label) " "; color: var(--muted); }
}
</style>
</head>
<body>
<p class="kicker">Annotation report</p>
<h1>$title</h1>
<p>q is the probability that the instruct model gives to a target token after the tokens before it. GIFT weighs the
token's loss by it.</p>
<div class="overview"><div>$data</div><div>$provenance</div></div>

<h2>Where the confidences lie</h2>
<p class="note">The weight Σq is what each band counts in training at a confidence exponent of 1. Point at a bar for its
count.</p>
$distributions

<h2>Rows from the least to the most confident</h2>
<p class="note">Rows at quantiles of their mean q, over all splits. Every target token is shaded by its q; point at it for
its text, id and q. The middle of long prompts and rows is left out.</p>
$legend
$examples

<h2>The $num_lowest target tokens with the lowest confidence</h2>
<p class="note">The outlined token is the one the instruct model expected least; ⏎ is a line break. Many of one kind point
to the data: a template the model was not trained on, another language, answers that are cut off or wrong.</p>
<table class="lowest"><thead><tr><th>q</th><th>split</th><th>row</th><th>position</th><th>id</th><th>in context</th></tr></thead><tbody>$lowest</tbody></table>
</body>
</html>
"""
