//! What the error channel says at the end of a command.
//!
//! Source: `metav1.Status` of the Kubernetes API; its use is in KEP-4006 and
//! k8s.io/cri-streaming `remotecommand`.

use serde_json::json;

/// How a command, or being attached, ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With exit code 0, or as it should.
    Success,
    /// With another exit code.
    Exit(i32),
    /// It could not be run, or nobody knows how it ended.
    Failure(String),
}

impl Outcome {
    /// The API's Status object.
    pub fn json(&self) -> String {
        let status = match self {
            Self::Success => json!({"metadata": {}, "status": "Success"}),
            Self::Exit(code) => json!({
                "metadata": {},
                "status": "Failure",
                "message": self.text(),
                "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Self::Failure(_) => json!({
                "metadata": {},
                "status": "Failure",
                "message": self.text(),
                "reason": "InternalError",
                "code": 500,
            }),
        };
        status.to_string()
    }

    /// What protocols before v4 say; empty for a success.
    pub fn text(&self) -> String {
        match self {
            Self::Success => String::new(),
            Self::Exit(code) => format!("command terminated with non-zero exit code: {code}"),
            Self::Failure(why) => format!("Internal error occurred: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_is_a_cause() {
        let status: serde_json::Value = serde_json::from_str(&Outcome::Exit(3).json()).unwrap();
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["reason"], "ExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "3");
        assert_eq!(Outcome::Success.text(), "");
    }
}
