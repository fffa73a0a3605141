"""The style of report.html: light and dark by the reader's setting, one column on a phone, nothing loaded."""

CSS = """
:root { color-scheme: light dark;
  --back: #f6f8fa; --card: #ffffff; --text: #1f2328; --soft: #59636e; --line: #d8dee4;
  --sft: #0072b2; --policy: #d55e00; --good: #1a7f37; --bad: #cf222e; --unclear: #9a6700; }
@media (prefers-color-scheme: dark) { :root {
  --back: #0d1117; --card: #161b22; --text: #e6edf3; --soft: #9198a1; --line: #30363d;
  --sft: #56b4e9; --policy: #f0883e; --good: #3fb950; --bad: #f85149; --unclear: #d29922; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 40px 0 12px; }
p { margin: 0 0 12px; } .soft { color: var(--soft); font-size: .9rem; }
.verdict { background: var(--card); border: 1px solid var(--line); border-left: 6px solid var(--tone);
  border-radius: 8px; padding: 14px 18px; margin: 20px 0; font-size: 1.1rem; }
.good { --tone: var(--good); } .bad { --tone: var(--bad); } .unclear { --tone: var(--unclear); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 205px), 1fr)); gap: 12px; }
.card, .sample, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.card { padding: 12px 16px; } .card b { display: block; font-size: 1.55rem; line-height: 1.3; }
.card .name { font-size: .9rem; color: var(--soft); }
ul { margin: 0; padding-left: 20px; } li { margin: 4px 0; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 14px; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; } td { white-space: nowrap; } th .soft { display: block; font-weight: 400; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 12px; }
figure { margin: 0; padding: 8px; } figure img { width: 100%; height: auto; display: block; }
.sample { padding: 14px 18px; margin: 0 0 12px; }
.sample .prompt { font-weight: 600; margin: 0 0 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 14px; }
.answer { border-left: 3px solid var(--line); padding-left: 10px; min-width: 0; }
.answer.sft { border-color: var(--sft); } .answer.policy { border-color: var(--policy); }
.answer p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 720px) { th .soft { display: none; } td { white-space: normal; }
  th, td { padding: 6px 8px; font-size: .88rem; } }
footer { margin-top: 40px; border-top: 1px solid var(--line); padding-top: 16px; }
"""
