//! Every input that was ever worth keeping, and what a few blind changes make
//! of each.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

fn corpus() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

fn inputs(name: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<_> = fs::read_dir(corpus().join(name))
        .unwrap_or_else(|error| panic!("fuzz/corpus/{name}: {error}"))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

#[test]
fn every_input_ever_kept_is_taken() {
    for target in berth_fuzz::TARGETS {
        let inputs = inputs(target.name);
        assert!(!inputs.is_empty(), "fuzz/corpus/{} is empty", target.name);
        for input in &inputs {
            (target.run)(input);
        }
        (target.run)(b"");
    }
}

/// Each input cut short, with a byte flipped and doubled: the same ones in every run.
#[test]
fn so_is_every_input_after_blind_changes() {
    for target in berth_fuzz::TARGETS {
        for input in inputs(target.name).iter().filter(|input| !input.is_empty()) {
            let steps = 64.min(input.len());
            for step in 0..steps {
                let at = step * input.len() / steps;
                (target.run)(&input[..at]);
                let mut changed = input.clone();
                changed[at] ^= 1 << (step % 8);
                (target.run)(&changed);
                changed.splice(at..at, input[..at.min(512)].iter().copied());
                (target.run)(&changed);
            }
        }
    }
}

#[test]
fn every_corpus_has_its_target() {
    let targets: BTreeSet<_> = berth_fuzz::TARGETS
        .iter()
        .map(|t| t.name.to_owned())
        .collect();
    let corpora: BTreeSet<_> = fs::read_dir(corpus())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(targets, corpora);
    assert_eq!(
        targets.len(),
        berth_fuzz::TARGETS.len(),
        "two targets of one name"
    );
}
