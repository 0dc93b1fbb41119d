"""The CSS of a page, for screens, phones and print."""

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #5f6b78; --line: #d9dee4; --wash: #f5f7f9; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 912px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 48px 0 12px; padding-top: 12px;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 28px 0 4px; }
p { margin: 0 0 12px; max-width: 72ch; }
.note { color: var(--soft); font-size: 0.875rem; }
.missing { background: var(--wash); border-left: 3px solid #e07a1f; padding: 8px 12px;
  font-size: 0.9375rem; overflow-wrap: anywhere; }
figure { margin: 12px 0 16px; }
figure img { display: block; width: 100%; height: auto; }
dl { margin: 0; }
dt { color: var(--soft); font-size: 0.8125rem; line-height: 1.3; }
dd { margin: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr));
  gap: 10px 24px; margin: 12px 0 24px; font-size: 0.9375rem; }
.facts dd { overflow-wrap: anywhere; }
.date { white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr));
  gap: 1px; padding: 1px; }
.cards > div { box-shadow: 0 0 0 1px var(--line); padding: 10px 12px;
  display: flex; flex-direction: column; justify-content: space-between; }
.cards dd { font-size: 1.375rem; font-weight: 600; line-height: 1.3; white-space: nowrap; }
.number { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 8px 0 16px; }
table { border-collapse: collapse; font-size: 0.875rem; min-width: 50%; }
caption { text-align: left; color: var(--soft); padding-bottom: 4px; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--ink);
  vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; }
tbody th { font-weight: 400; white-space: normal; overflow-wrap: anywhere; min-width: 6.5rem; }
tbody tr:hover { background: var(--wash); }
.wrap th, .wrap td { white-space: normal; overflow-wrap: anywhere; text-align: left;
  vertical-align: top; }
.columns { columns: 2; column-gap: 40px; }
.columns .scroll { margin-top: 0; break-inside: avoid; }
.columns table { width: 100%; }
details { margin: 8px 0 16px; }
summary { cursor: pointer; color: var(--soft); font-size: 0.9375rem; }
a { color: #2364aa; }
@media screen and (max-width: 600px) {
  main { padding: 20px 14px 48px; }
  h1 { font-size: 1.375rem; }
  h2 { font-size: 1.125rem; margin-top: 36px; }
  .cards { grid-template-columns: repeat(2, 1fr); }
  .cards dd { font-size: 1.1875rem; }
  .facts { grid-template-columns: 1fr 1fr; gap: 8px 16px; }
  .columns { columns: 1; }
  table { min-width: 100%; }
}
@page { size: A4; margin: 14mm 13mm; }
@media print {
  body { font-size: 10.5pt; color: #000; }
  main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  h2 { margin-top: 22pt; }
  figure, .cards, tr, p, .together { break-inside: avoid; }
  details { display: none; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding: 3pt 10pt 3pt 0; }
  .cards { grid-template-columns: repeat(6, 1fr); }
  .cards dd { font-size: 14pt; }
  a { color: inherit; text-decoration: none; }
}
"""
