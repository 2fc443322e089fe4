"""The style and the text of the annotation report, as `string.Template`s."""

STYLE = """\
:root { --very-low: rgb(233,106,66); }
$light_shades
@media (prefers-color-scheme: dark) {
:root { --very-low: rgb(178,48,26); }
$dark_shades
}
.overview { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem 2.5rem; align-items: start; margin-top: 1rem; }
.bands tbody th { white-space: nowrap; }
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
  .overview, .bands { grid-template-columns: minmax(0, 1fr); }
  .lowest thead { display: none; }
  .lowest tr { display: flex; flex-wrap: wrap; gap: 0 .9rem; padding: .5rem 0; border-bottom: 1px solid var(--faint); }
  .lowest th:last-child { text-align: left; }
  .lowest td { border: 0; padding: 0; }
  .lowest td[data-label]::before { content: attr(data-label) " "; color: var(--muted); }
}"""

BODY = """\
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
<table class="lowest"><thead><tr><th>q</th><th>split</th><th>row</th><th>position</th><th>id</th><th>in context</th></tr></thead><tbody>$lowest</tbody></table>"""
