//! What an incident has no names for, and writing names into it. Pure.

use std::collections::{BTreeMap, BTreeSet};

use memtrace_incident::{Frame, Incident};
use serde::{Deserialize, Serialize};

/// Most distinct addresses that are named at once.
pub const MAX_OFFSETS: usize = 65_536;
/// Most frames of a stack once inlined functions have frames of their own.
const MAX_FRAMES: usize = 1024;

/// A module as frames name it: path and build id (lower-case hex).
pub type ModuleName = (String, Option<String>);

/// Offsets without a name, by module. Cap: [`MAX_OFFSETS`] offsets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnnamedFrames(pub Vec<(ModuleName, BTreeSet<u64>)>);

/// A function at an offset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionName {
    /// Function, demangled.
    pub symbol: String,
    /// Source file.
    pub file: Option<String>,
    /// Source line, from 1.
    pub line: Option<u32>,
}

/// The functions at one offset of a module: the innermost inlined one first, the function that all
/// others were inlined into last.
pub type OffsetNames = (u64, Vec<FunctionName>);

/// Names found, by module. Cap: [`MAX_OFFSETS`] offsets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameNames(pub Vec<(ModuleName, Vec<OffsetNames>)>);

/// How many frames got a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamingSummary {
    /// Frames without a name that have a module and an offset.
    pub asked: usize,
    /// Of these, frames that have a name now.
    pub named: usize,
}

impl UnnamedFrames {
    /// Those of an incident.
    pub fn of(incident: &Incident) -> Self {
        Self::of_frames(incident.allocation_paths.iter().flat_map(|path| &path.frames))
    }

    /// Those of some frames; beyond [`MAX_OFFSETS`] frames the rest is left out.
    pub fn of_frames<'a>(frames: impl Iterator<Item = &'a Frame>) -> Self {
        let mut unnamed: BTreeMap<ModuleName, BTreeSet<u64>> = BTreeMap::new();
        for (module, offset) in frames.filter_map(unnamed_place).take(MAX_OFFSETS) {
            unnamed.entry(module).or_default().insert(offset);
        }
        Self(unnamed.into_iter().collect())
    }
}

impl FrameNames {
    /// Writes the names into an incident. Functions that were inlined become frames of their own.
    pub fn apply(&self, incident: &mut Incident) -> NamingSummary {
        let known: BTreeMap<&ModuleName, BTreeMap<u64, &[FunctionName]>> = self
            .0
            .iter()
            .map(|(module, names)| (module, names.iter().map(|(offset, names)| (*offset, names.as_slice())).collect()))
            .collect();
        let mut summary = NamingSummary::default();
        for path in &mut incident.allocation_paths {
            let mut frames = Vec::with_capacity(path.frames.len());
            for frame in std::mem::take(&mut path.frames) {
                let Some((module, offset)) = unnamed_place(&frame) else {
                    frames.push(frame);
                    continue;
                };
                summary.asked = summary.asked.saturating_add(1);
                let names = known.get(&module).and_then(|names| names.get(&offset).copied()).unwrap_or_default();
                summary.named = summary.named.saturating_add(usize::from(!names.is_empty()));
                match names {
                    [] => frames.push(frame),
                    names if frames.len().saturating_add(names.len()) > MAX_FRAMES => {
                        frames.extend(names.last().map(|name| named(&frame, name, false)));
                    }
                    names => {
                        let inlined = names.len().saturating_sub(1);
                        frames.extend(names.iter().enumerate().map(|(at, name)| named(&frame, name, at < inlined)));
                    }
                }
            }
            path.frames = frames;
        }
        summary
    }
}

/// Module and offset of a frame that could have a name and has none.
fn unnamed_place(frame: &Frame) -> Option<(ModuleName, u64)> {
    let open = frame.symbol.is_none() && !frame.kernel && !frame.inlined;
    let (module, offset) = (frame.module.as_ref()?, frame.offset?);
    open.then(|| ((module.clone(), frame.build_id.clone()), offset))
}

fn named(frame: &Frame, name: &FunctionName, inlined: bool) -> Frame {
    Frame { symbol: Some(name.symbol.clone()), file: name.file.clone(), line: name.line, inlined, ..frame.clone() }
}
