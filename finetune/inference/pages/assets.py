"""Style sheet and script of the HTML report, as strings because the report is one file.

The style follows the system's light or dark scheme, folds to one column on a phone and prints without controls. The
script does four things: language switch, filter, sort, enlarge a picture. The report is readable without it.
"""

from __future__ import annotations

from finetune.markup import BASE_CSS, LANGUAGE_SCRIPT

CSS = (
    BASE_CSS
    + """
table.metrics{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.metrics th,.metrics td{padding:6px 14px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
.metrics thead th{border-top:0;color:var(--soft);font-weight:500;font-size:.85rem}
.metrics th:first-child{text-align:left;font-weight:500}
.metrics .group th{background:var(--tile);font-size:.85rem;font-weight:650;padding-top:8px}
.metrics td.best{font-weight:700}.metrics .none,.metrics .ci{color:var(--soft)}.arrow{color:var(--soft)}
.metrics .plot{width:150px;text-align:left}.metrics .plot .right{float:right}
.metrics caption{text-align:left;padding:10px 14px 6px;font-weight:650;font-size:.9rem}
.scroll.ops{max-width:760px}
.confusion td.hit{font-weight:700;background:var(--okbg);color:var(--ok)}
.metrics tr.used>*{background:var(--tile);box-shadow:inset 0 1px var(--accent),inset 0 -1px var(--accent)}
.tables{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));align-items:start}
.tables .metrics th,.tables .metrics td{padding:3px 12px}
.tables .metrics thead th{white-space:normal}
.dots{width:120px;height:16px;display:block}.dots .axis{stroke:var(--line);stroke-width:1.5}
.dots .ci{stroke:var(--c1);stroke-width:5;opacity:.35;stroke-linecap:round}.dots .model{fill:var(--c1)}
.dots .base{fill:var(--card);stroke:var(--soft);stroke-width:1.4}
.charts{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.chart{margin:0;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:10px 12px 6px}
.chart figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline;font-size:.87rem;margin:0 4px 4px}
.chart figcaption b{font-weight:600;margin-right:auto}
.chart svg{width:100%;height:auto;display:block}
.chart text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}.line.raw{opacity:.3;stroke-width:1.2}
.line.chance{stroke:var(--soft);stroke-dasharray:4 4;stroke-width:1}
.dot,.bar.c1,.bar.c2,.bar.c3,.bar.c4{fill:currentColor}
.threshold{stroke:var(--ink);stroke-dasharray:4 3;stroke-width:1.2}
.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}
.key::before{content:"";display:inline-block;width:12px;height:4px;border-radius:2px;background:currentColor;margin-right:5px;
vertical-align:middle}
.controls{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;gap:8px 16px;align-items:center;
background:var(--bg);padding:10px 0;margin-top:12px}
.filters{display:flex;flex-wrap:wrap;gap:6px}.filters button{padding:3px 11px;border-radius:999px;font-size:.9rem}
.controls output{color:var(--soft);margin-left:auto;font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:4px 6px;align-items:center;margin-bottom:12px}
.scale{width:130px;height:10px;border-radius:3px}
.swatch{width:14px;height:14px;border-radius:3px;margin-left:14px;border:2px solid}
.pred.swatch{border-color:#ff4030;background:#ff403073}.true.swatch{border-color:#00b4c8}
#cards{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,560px),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-left:5px solid var(--soft);border-radius:12px;
padding:12px 14px;min-width:0}
.card.ok{border-left-color:var(--ok)}.card.bad{border-left-color:var(--bad)}
.card>header{display:flex;gap:10px;align-items:center;margin-bottom:8px}
h3{font:600 .92rem/1.35 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:0;flex:1;overflow-wrap:anywhere}
.badge{font-size:.8rem;font-weight:600;border-radius:999px;padding:1px 10px;white-space:nowrap;color:var(--soft);
border:1px solid var(--line)}
.badge.ok{color:var(--ok);background:var(--okbg);border-color:transparent}
.badge.bad{color:var(--bad);background:var(--badbg);border-color:transparent}
.pictures{display:grid;grid-template-columns:repeat(4,1fr);gap:8px}
.pictures figure{margin:0;min-width:0}
.pictures img,.missing{display:block;
width:100%;aspect-ratio:1;object-fit:contain;background:var(--tile);border-radius:6px}
.pictures img{cursor:zoom-in}
.missing{display:grid;place-items:center;color:var(--soft);font-size:.8rem;
background:repeating-linear-gradient(135deg,var(--line) 0 2px,var(--tile) 2px 12px)}
.pictures figcaption{color:var(--soft);font-size:.8rem;text-align:center;margin-top:2px}
.facts dl{display:flex;flex-wrap:wrap;gap:4px 22px;margin-top:8px;font-variant-numeric:tabular-nums}
.label1{color:var(--c2)}.label0{color:var(--c4)}
.meter{display:inline-block;width:64px;height:6px;border-radius:3px;background:var(--line);overflow:hidden;vertical-align:middle}
.meter i{display:block;height:100%;background:var(--c1)}
.answer{margin-top:8px;font-size:.87rem}.answer>span:first-child{color:var(--soft);margin-right:8px}
pre{margin:5px 0 0;padding:8px 10px;background:var(--tile);border:1px solid var(--line);border-radius:8px;
max-height:116px;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,
"Noto Sans Mono CJK SC","WenQuanYi Zen Hei Mono","PingFang SC","Microsoft YaHei",monospace}
dialog{border:0;border-radius:12px;padding:12px;background:var(--card);color:var(--ink);max-width:96vw}
dialog::backdrop{background:#000b}dialog img{display:block;width:min(88vw,78vh);max-height:82vh;object-fit:contain}
dialog p{margin:6px 0 0;text-align:center;font-size:.87rem}
[hidden]{display:none!important}
@media (max-width:600px){main,.bar,dl.run{padding-left:12px;padding-right:12px}.pictures{grid-template-columns:1fr 1fr}
.controls{position:static}dl.run{grid-template-columns:1fr 1fr}.metrics th,.metrics td{padding:6px 9px}
.metrics tr>th:first-child{white-space:normal;min-width:104px;position:sticky;left:0;background:var(--card)}}
@media print{:root{--bg:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#ccc;--tile:#f6f6f6;--accent:#1f63d0;
--ok:#17703f;--okbg:#fff;--bad:#b3261e;--badbg:#fff;--c1:#1f63d0;--c2:#d2481c;--c3:#7a3fc4;--c4:#14866d}
html,body{font-size:11px}.scroll{overflow:visible}.metrics th,.metrics td{padding:3px 7px}
nav,.languages,.controls{display:none}.card,.chart,.tile,tr{break-inside:avoid}
main,.bar,dl.run{max-width:none;padding-left:0;padding-right:0}pre{max-height:none;overflow:visible}
.charts{grid-template-columns:repeat(3,1fr)}#cards{grid-template-columns:1fr 1fr}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
)

SCRIPT = (
    """
(function(){
"""
    + LANGUAGE_SCRIPT
    + """var cards=all('.card'),box=document.getElementById('cards'),none=document.getElementById('none');
function matches(card,f){var o=card.dataset.outcome;
 return f==='all'||(f==='wrong'?o==='fp'||o==='fn':o===f||card.dataset.op===f)}
function filter(f){var n=0;cards.forEach(function(c){c.hidden=!matches(c,f);n+=c.hidden?0:1});
 all('[data-filter]').forEach(function(b){b.setAttribute('aria-pressed',b.dataset.filter===f)});
 none.hidden=n>0;document.getElementById('shown').textContent=n+' / '+cards.length}
function sort(value){var p=value.split('-'),sign=p[1]==='down'?-1:1;
 cards.sort(function(a,b){var x=a.dataset[p[0]],y=b.dataset[p[0]];
  if((x==='')!==(y===''))return x===''?1:-1;
  return sign*(x-y)||a.dataset.index-b.dataset.index});
 cards.forEach(function(c){box.appendChild(c)})}
if(box){all('[data-filter]').forEach(function(b){b.onclick=function(){filter(b.dataset.filter)}});
 document.getElementById('sort').onchange=function(){sort(this.value)};filter('all')}
var zoom=document.getElementById('zoom');
if(zoom){all('.pictures img').forEach(function(i){
  i.onclick=function(){zoom.firstChild.src=i.src;zoom.firstChild.alt=i.alt;zoom.lastChild.textContent=i.alt;zoom.showModal()};
  i.onkeydown=function(e){if(e.key==='Enter'||e.key===' '){e.preventDefault();i.onclick()}}});
 zoom.onclick=function(){zoom.close()}}
})();
"""
)
