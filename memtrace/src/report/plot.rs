//! The memory curve in block characters: usage, the part of it that is anonymous, and the limit.

use super::curve::{Level, Window};
use super::{Line, Paint, Style, units};

/// Lower blocks of one to seven eighths.
const EIGHTHS: [char; 7] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇'];
/// Levels of one cell.
const STEPS: u64 = 8;

/// What a plot needs to know besides its columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    /// Rows of cells below the top line.
    pub(super) rows: u64,
    /// Value at the top.
    pub(super) top_bytes: u64,
    /// Columns left of the axis for labels; none: no labels.
    pub(super) gutter: usize,
}

/// Value at the top of a plot: the limit where the curve comes near it, the peak otherwise.
pub(super) fn top(levels: &[&[Level]]) -> u64 {
    let all = || levels.iter().flat_map(|levels| levels.iter());
    let peak = all().filter_map(|level| level.usage.max(level.anon.filter(|_| level.usage.is_none()))).max();
    let peak = peak.unwrap_or(0);
    let limit = all().filter_map(|level| level.limit).filter(|limit| limit / 4 <= peak).max();
    peak.max(limit.unwrap_or(0)).max(1)
}

/// The plot, top line first; every line is as wide as gutter, axis and columns.
pub(super) fn lines(levels: &[Level], window: &Window, frame: &Frame, style: &Style) -> Vec<Line> {
    let mut lines: Vec<Line> = (0..=frame.rows).rev().map(|row| plot_row(levels, frame, row, style)).collect();
    lines.push(axis(levels.len(), frame, style));
    lines.push(time_labels(levels.len(), window, frame, style));
    lines
}

/// What the shades mean, the limit only where it is drawn.
pub(super) fn legend(limit: bool, style: &Style) -> Line {
    let mut line = Line::default();
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

fn plot_row(levels: &[Level], frame: &Frame, row: u64, style: &Style) -> Line {
    let mut line = Line::default();
    let limit_here = levels.last().and_then(|level| level.limit).filter(|limit| limit_row(*limit, frame) == Some(row));
    let label = match (limit_here, row) {
        (Some(limit), _) => format!("limit {}", units::bytes(limit)),
        (None, 0) => "0 B".to_owned(),
        (None, row) if row == frame.rows => units::bytes(frame.top_bytes),
        (None, row) if row * 2 == frame.rows => units::bytes(frame.top_bytes / 2),
        _ => String::new(),
    };
    if frame.gutter > 0 {
        let paint = if limit_here.is_some() { Paint::Limit } else { Paint::Faint };
        line.add(style, paint, &format!("{label:>width$} ", width = frame.gutter));
    }
    let axis = match (style.unicode, label.is_empty()) {
        (true, true) => "│",
        (true, false) => "┤",
        (false, _) => "|",
    };
    line.add(style, Paint::Faint, axis);
    let mut run: Option<(Paint, String)> = None;
    for level in levels {
        let (paint, character) = cell(level, frame, row, style.unicode);
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

fn cell(level: &Level, frame: &Frame, row: u64, unicode: bool) -> (Paint, char) {
    let usage = steps(level.usage.or(level.anon).unwrap_or(0), frame);
    let anon = steps(level.anon.unwrap_or(0), frame).min(usage);
    let (bottom, top) = (row * STEPS, (row + 1) * STEPS);
    if usage > bottom {
        let mostly_anon = anon >= bottom + STEPS / 2 || (usage < top && anon > bottom);
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
    match level.limit {
        Some(limit) if limit_row(limit, frame) == Some(row) => (Paint::Limit, if unicode { '╌' } else { '-' }),
        _ => (Paint::Plain, ' '),
    }
}

/// Eighths of a row that a value fills; anything above nothing shows.
fn steps(value: u64, frame: &Frame) -> u64 {
    let full = u128::from(frame.rows * STEPS);
    let exact = (u128::from(value) * full + u128::from(frame.top_bytes) / 2) / u128::from(frame.top_bytes.max(1));
    u64::try_from(exact.min(full)).unwrap_or(0).max(u64::from(value > 0))
}

/// The row a limit is drawn in: the one above it when it lies on a boundary, none beyond the top.
fn limit_row(limit: u64, frame: &Frame) -> Option<u64> {
    (limit <= frame.top_bytes).then(|| steps(limit, frame) / STEPS)
}

fn axis(columns: usize, frame: &Frame, style: &Style) -> Line {
    let (corner, tick, dash) = if style.unicode { ('└', '┴', '─') } else { ('+', '+', '-') };
    let mut text = " ".repeat(indent(frame));
    text.push(corner);
    let ticks = tick_columns(columns);
    text.extend((0..columns).map(|column| if ticks.contains(&column) { tick } else { dash }));
    let mut line = Line::default();
    line.add(style, Paint::Faint, &text);
    line
}

fn time_labels(columns: usize, window: &Window, frame: &Frame, style: &Style) -> Line {
    let begin = indent(frame) + 1;
    let mut text = String::new();
    let mut used = 0;
    let ticks = tick_columns(columns);
    let last = ticks.len().saturating_sub(1) as u64;
    for (number, column) in ticks.iter().enumerate() {
        let moment = window.start_ns.saturating_add((window.span() / last.max(1)).saturating_mul(number as u64));
        let moment = if number as u64 == last { window.end_ns } else { moment };
        let label = relative(moment, window);
        let width = label.chars().count();
        // Centred below its tick, within the plot.
        let wanted = (begin + column).saturating_sub(width / 2);
        let at = wanted.min((begin + columns).saturating_sub(width)).max(begin.saturating_sub(1));
        if at > used || used == 0 {
            text.extend(std::iter::repeat_n(' ', at.saturating_sub(used)));
            text.push_str(&label);
            used = at + width;
        }
    }
    let mut line = Line::default();
    line.add(style, Paint::Faint, &text);
    line.pad(begin + columns);
    line
}

/// `-2.5 s`, `-250 ms`, `0`.
fn relative(moment_ns: u64, window: &Window) -> String {
    let (sign, distance) = if moment_ns < window.zero_ns {
        ("-", window.zero_ns - moment_ns)
    } else {
        ("+", moment_ns - window.zero_ns)
    };
    match distance {
        0 => "0".to_owned(),
        _ => format!("{sign}{}", units::duration(distance)),
    }
}

fn tick_columns(columns: usize) -> Vec<usize> {
    let parts = if columns >= 56 { 5 } else if columns >= 24 { 4 } else { 2 };
    (0..=parts).map(|part| (columns.saturating_sub(1)) * part / parts).collect()
}

fn indent(frame: &Frame) -> usize {
    if frame.gutter > 0 { frame.gutter + 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(levels: &[Level], unicode: bool) -> String {
        let frame = Frame { rows: 4, top_bytes: top(&[levels]), gutter: 10 };
        let window = Window { start_ns: 0, end_ns: 10_000_000_000, zero_ns: 10_000_000_000 };
        let style = Style { colour: false, width: 80, unicode };
        lines(levels, &window, &frame, &style).iter().map(|line| line.text.clone() + "\n").collect()
    }

    #[test]
    fn a_ramp_to_the_limit() {
        let levels: Vec<Level> = (0..30)
            .map(|at| Level { usage: Some(at * 10 / 29 + 90 * (at / 29)), anon: Some(at * 3 / 29), limit: Some(100) })
            .collect();
        insta::assert_snapshot!(draw(&levels, true));
        insta::assert_snapshot!(draw(&levels, false));
    }

    #[test]
    fn extremes_do_not_overflow() {
        let levels = [
            Level { usage: Some(u64::MAX), anon: Some(u64::MAX), limit: Some(u64::MAX) },
            Level { usage: None, anon: None, limit: None },
            Level { usage: Some(0), anon: Some(u64::MAX), limit: Some(0) },
        ];
        draw(&levels, true);
        draw(&[], true);
    }
}
