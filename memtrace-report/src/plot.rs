//! Draws the memory curve in block characters: usage, its anonymous part, and the limit.
//!
//! A cell is one column of the curve and eight steps high (`▁` to `█`). ASCII has one step per
//! cell.

use std::cmp::Ordering;

use memtrace_incident::units;

use super::curve::{self, CurveLevel, DrawnSpan};
use super::{Paint, Style, StyledLine};

/// Blocks that fill one to seven eighths of a cell from below.
const EIGHTHS: [char; 7] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇'];
/// Columns that a tick of the time axis needs, with its label.
const TICK_COLUMNS: usize = 10;
/// Heights that one cell can show.
const CELL_STEPS: u64 = 8;

/// The size and the scale of a plot.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlotArea {
    /// Rows of cells below the top line.
    pub(super) rows: u64,
    /// Value at the upper edge, bytes.
    pub(super) top_bytes: u64,
    /// Columns for labels left of the axis; 0: no labels.
    pub(super) gutter: usize,
}

/// Value at the upper edge of plots that share a scale, bytes: the limit if the peak reaches a
/// quarter of it, else the peak.
pub(super) fn top_bytes(levels: &[&[CurveLevel]]) -> u64 {
    let all = || levels.iter().flat_map(|levels| levels.iter());
    let peak =
        all().filter_map(|level| level.usage_bytes.max(level.anon_bytes.filter(|_| level.usage_bytes.is_none()))).max();
    let peak = peak.unwrap_or(0);
    let limit = all().filter_map(|level| level.limit_bytes).filter(|limit| limit / 4 <= peak).max();
    peak.max(limit.unwrap_or(0)).max(1)
}

/// The lines of the plot from top to bottom, each as wide as gutter, axis and columns together.
pub(super) fn lines(levels: &[CurveLevel], window: &DrawnSpan, area: &PlotArea, style: &Style) -> Vec<StyledLine> {
    let mut lines: Vec<StyledLine> = (0..=area.rows).rev().map(|row| plot_row(levels, area, row, style)).collect();
    let ticks = ticks(levels.len(), window);
    lines.push(axis(levels.len(), &ticks, area, style));
    lines.push(time_labels(levels.len(), &ticks, area, style));
    lines
}

/// The legend of the shades, with the limit if it is drawn.
pub(super) fn legend(limit: bool, style: &Style) -> StyledLine {
    let mut line = StyledLine::default();
    let (anon, usage, dash) = if style.unicode { ("█", "▒", "╌") } else { ("#", ":", "-") };
    line.add(style, Paint::Anon, anon);
    line.add(style, Paint::Faint, " anonymous  ");
    line.add(style, Paint::Usage, usage);
    line.add(style, Paint::Faint, " other usage");
    if limit {
        line.add(style, Paint::Limit, &format!("  {dash}"));
        line.add(style, Paint::Faint, " limit");
    }
    line
}

fn plot_row(levels: &[CurveLevel], area: &PlotArea, row: u64, style: &Style) -> StyledLine {
    let mut line = StyledLine::default();
    let limit_here =
        levels.last().and_then(|level| level.limit_bytes).filter(|limit| limit_row(*limit, area) == Some(row));
    let label = match (limit_here, row) {
        (Some(limit), _) => format!("limit {}", units::bytes(limit)),
        (None, 0) => "0 B".to_owned(),
        (None, row) if row == area.rows => units::bytes(area.top_bytes),
        (None, row) if row * 2 == area.rows => units::bytes(area.top_bytes / 2),
        _ => String::new(),
    };
    if area.gutter > 0 {
        let paint = if limit_here.is_some() { Paint::Limit } else { Paint::Faint };
        line.add(style, paint, &format!("{label:>width$} ", width = area.gutter));
    }
    let axis = match (style.unicode, label.is_empty()) {
        (true, true) => "│",
        (true, false) => "┤",
        (false, _) => "|",
    };
    line.add(style, Paint::Faint, axis);
    let mut run: Option<(Paint, String)> = None;
    for level in levels {
        let (paint, character) = cell(level, area, row, style.unicode);
        match &mut run {
            Some((same, text)) if *same == paint => text.push(character),
            _ => {
                if let Some((paint, text)) = run.replace((paint, character.to_string())) {
                    line.add(style, paint, &text);
                }
            }
        }
    }
    if let Some((paint, text)) = run {
        line.add(style, paint, &text);
    }
    line
}

fn cell(level: &CurveLevel, area: &PlotArea, row: u64, unicode: bool) -> (Paint, char) {
    let usage = steps(level.usage_bytes.or(level.anon_bytes).unwrap_or(0), area);
    let anon = steps(level.anon_bytes.unwrap_or(0), area).min(usage);
    let (bottom, top) = (row * CELL_STEPS, (row + 1) * CELL_STEPS);
    if usage > bottom {
        let mostly_anon = anon >= bottom + CELL_STEPS / 2 || (usage < top && anon > bottom);
        let paint = if mostly_anon { Paint::Anon } else { Paint::Usage };
        let eighths = usize::try_from(usage - bottom).unwrap_or(usize::MAX);
        let block = match (unicode, EIGHTHS.get(eighths - 1), mostly_anon) {
            (true, Some(block), _) => *block,
            (true, None, true) => '█',
            (true, None, false) => '▒',
            (false, _, true) => '#',
            (false, _, false) => ':',
        };
        return (paint, block);
    }
    match level.limit_bytes {
        Some(limit) if limit_row(limit, area) == Some(row) => (Paint::Limit, if unicode { '╌' } else { '-' }),
        _ => (Paint::Plain, ' '),
    }
}

/// Eighths of a row that a value fills; at least one if it is above 0, so that it is visible.
fn steps(value: u64, area: &PlotArea) -> u64 {
    let full = u128::from(area.rows * CELL_STEPS);
    let exact = (u128::from(value) * full + u128::from(area.top_bytes) / 2) / u128::from(area.top_bytes.max(1));
    u64::try_from(exact.min(full)).unwrap_or(0).max(u64::from(value > 0))
}

/// The row a limit is drawn in: the upper one if it lies between two, `None` if it is above the
/// plot.
fn limit_row(limit: u64, area: &PlotArea) -> Option<u64> {
    (limit <= area.top_bytes).then(|| steps(limit, area) / CELL_STEPS)
}

fn axis(columns: usize, ticks: &[(usize, String)], area: &PlotArea, style: &Style) -> StyledLine {
    let (corner, tick, dash) = if style.unicode { ('└', '┴', '─') } else { ('+', '+', '-') };
    let mut text = " ".repeat(indent(area));
    text.push(corner);
    text.extend((0..columns).map(|column| if ticks.iter().any(|(at, _)| *at == column) { tick } else { dash }));
    let mut line = StyledLine::default();
    line.add(style, Paint::Faint, &text);
    line
}

fn time_labels(columns: usize, ticks: &[(usize, String)], area: &PlotArea, style: &Style) -> StyledLine {
    let begin = indent(area) + 1;
    let mut text = String::new();
    let mut used = 0;
    for (column, label) in ticks {
        let width = label.chars().count();
        // Centred below its tick, but within the plot.
        let wanted = (begin + column).saturating_sub(width / 2);
        let at = wanted.min((begin + columns).saturating_sub(width)).max(begin.saturating_sub(1));
        if at > used || used == 0 {
            text.extend(std::iter::repeat_n(' ', at.saturating_sub(used)));
            text.push_str(label);
            used = at + width;
        }
    }
    let mut line = StyledLine::default();
    line.add(style, Paint::Faint, &text);
    line.pad(begin + columns);
    line
}

/// Ticks at round distances from the moment labelled 0, as columns and labels.
fn ticks(columns: usize, window: &DrawnSpan) -> Vec<(usize, String)> {
    let (span, before) = (window.length_ns(), window.zero_ns.saturating_sub(window.start_ns));
    let step = curve::tick_ns(span, (columns / TICK_COLUMNS) as u64).max(1);
    let first = before / step;
    // Distances from the start of the window.
    let offsets = (0..=columns as u64)
        .map(|number| u128::from(before % step) + u128::from(number) * u128::from(step))
        .take_while(|offset| *offset <= u128::from(span));
    let last = columns.saturating_sub(1);
    (offsets.enumerate())
        .map(|(number, offset)| {
            let column = usize::try_from(offset * columns as u128 / u128::from(span)).unwrap_or(last).min(last);
            (column, label(number as u64, first, step, window))
        })
        .collect()
}

/// `-2.5 s`, `-250 ms`, `0`.
fn label(number: u64, first: u64, step: u64, window: &DrawnSpan) -> String {
    let distance = units::duration(number.abs_diff(first).saturating_mul(step));
    match number.cmp(&first) {
        Ordering::Less => format!("-{distance}"),
        Ordering::Equal => "0".to_owned(),
        // The axis starts at 0, so a sign would say nothing.
        Ordering::Greater if window.start_ns == window.zero_ns => distance,
        Ordering::Greater => format!("+{distance}"),
    }
}

fn indent(area: &PlotArea) -> usize {
    if area.gutter > 0 { area.gutter + 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(levels: &[CurveLevel], unicode: bool) -> String {
        let area = PlotArea { rows: 4, top_bytes: top_bytes(&[levels]), gutter: 10 };
        let window = DrawnSpan { start_ns: 0, end_ns: 10_000_000_000, zero_ns: 10_000_000_000 };
        let style = Style { colour: false, width: 80, unicode };
        lines(levels, &window, &area, &style).iter().map(|line| line.text.clone() + "\n").collect()
    }

    #[test]
    fn a_ramp_to_the_limit() {
        let levels: Vec<CurveLevel> = (0..30)
            .map(|at| CurveLevel {
                usage_bytes: Some(at * 10 / 29 + 90 * (at / 29)),
                anon_bytes: Some(at * 3 / 29),
                limit_bytes: Some(100),
            })
            .collect();
        insta::assert_snapshot!(draw(&levels, true));
        insta::assert_snapshot!(draw(&levels, false));
    }

    #[test]
    fn extremes_do_not_overflow() {
        let levels = [
            CurveLevel { usage_bytes: Some(u64::MAX), anon_bytes: Some(u64::MAX), limit_bytes: Some(u64::MAX) },
            CurveLevel { usage_bytes: None, anon_bytes: None, limit_bytes: None },
            CurveLevel { usage_bytes: Some(0), anon_bytes: Some(u64::MAX), limit_bytes: Some(0) },
        ];
        draw(&levels, true);
        draw(&[], true);
    }
}
