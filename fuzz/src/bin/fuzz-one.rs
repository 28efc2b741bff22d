//! libFuzzer around one target, which `BERTH_FUZZ` names. `fuzz/run` builds it
//! with coverage and runs it.
#![no_main]

use std::sync::OnceLock;

static TARGET: OnceLock<berth_fuzz::Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(
    init: {
        let name = std::env::var("BERTH_FUZZ").expect("BERTH_FUZZ names a target");
        let target = berth_fuzz::find(&name).expect("a target of fuzz/src/lib.rs");
        TARGET.get_or_init(|| target);
    },
    |data: &[u8]| {
        let target = TARGET.get().expect("initialised above");
        (target.run)(data);
    }
);
